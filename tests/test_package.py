"""The package as a whole: the cost of importing it, its public names and its words."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import at_extensions

LATE = ["timm", "robustbench", "matplotlib", "sklearn", "pyautoattack", "autoattack", "torchvision", "tensorboard"]
HEAVY = ["torch", "torchattacks", "scipy", *LATE]
ROOT = Path(at_extensions.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
ROOMS = sorted({file.split("/")[0].removesuffix(".py") for file in FILES} - {"__init__", "__main__", "cli"})


def python(code):
    """Run code in a fresh interpreter; return what it printed."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, at_extensions; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code) == "[]"


def test_using_every_room_prints_nothing_draws_nothing_and_imports_nothing_heavy_before_it_is_needed():
    code = (
        "import sys, torch, random, numpy as np\n"
        "before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())\n"
        f"import at_extensions as a; [getattr(a, r) for r in {ROOMS}]\n"
        "assert torch.equal(torch.get_rng_state(), before[0])\n"
        "assert (random.getstate(), str(np.random.get_state())) == before[1:]\n"
        f"print([m for m in {LATE} if m in sys.modules])"
    )
    assert python(code) == "[]"


@pytest.mark.parametrize("name", at_extensions.__all__)
def test_every_public_name_is_there(name):
    assert getattr(at_extensions, name) is not None
    assert name in dir(at_extensions)


def test_names_are_unique_and_others_are_refused():
    assert len(set(at_extensions.__all__)) == len(at_extensions.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'creat_model'"):
        at_extensions.creat_model  # noqa: B018
    assert not hasattr(at_extensions, "__wrapped__")


def test_shortcuts_are_the_rooms_own():
    assert at_extensions.create_model is at_extensions.models.create_model
    assert at_extensions.create_method is at_extensions.methods.create_method
    assert at_extensions.Trainer is at_extensions.training.Trainer
    assert at_extensions.evaluate is at_extensions.evaluation.evaluate


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_public_and_exports_what_it_lists(room):
    assert room in at_extensions.__all__
    module = getattr(at_extensions, room)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    for name in exported:
        assert getattr(module, name) is not None


def test_the_version_is_the_distributions():
    assert at_extensions.__version__ == importlib.metadata.version("at-extensions")


@pytest.mark.parametrize("file", FILES)
def test_every_file_opens_with_one_line_that_says_what_is_in_it(file):
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":"))


NOT_IMPORTED = {"setuptools", "huggingface_hub", "pyautoattack"}  # pins for dependencies; attacks, imported by name
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit_learn"}


def third_party(file):
    """Return the top-level packages that a file imports, at its top or inside a function, less the standard library."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"at_extensions", "autoattack"}  # the package serves autoattack


def test_dependencies_are_the_imported_packages():
    imported = {DISTRIBUTIONS.get(name, name) for file in FILES for name in third_party(file)}
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {Requirement(line).name.replace("-", "_") for line in project["dependencies"]}
    assert imported | NOT_IMPORTED == declared


BANNED = re.compile(r"\b(stand(s|ing)?(?! for)|lets? go|letting go|whoever|calm|what tells)\b", re.IGNORECASE)


@pytest.mark.parametrize("file", [*FILES, "README.md"])
def test_words_are_plain(file):
    lines = (ROOT.parent / file if file == "README.md" else ROOT / file).read_text(encoding="utf-8").splitlines()
    assert [f"{file}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if BANNED.search(line)] == []
