"""The import graph: no import runs upwards or in a circle, and private files stay in their folders."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import at_extensions

PACKAGE = Path(at_extensions.__file__).parent
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
UPWARDS, CIRCLE, PRIVATE = "No import runs upwards", "No circle", "A file that starts with an underscore"
VIOLATIONS = {  # case: the contract it breaks, the file it is in, the line that breaks it
    "upwards": (UPWARDS, "checks.py", "from at_extensions import cli"),
    "sideways": (UPWARDS, "attacks/pgd.py", "from at_extensions.data import load_dataset"),
    "inside a function": (UPWARDS, "data/npz.py", "def f():\n    from at_extensions.models import load_model"),
    "without a floor": (UPWARDS, "attic.py", '"""A file that no floor lists."""'),
    "circle": (CIRCLE, "optim/deat.py", "from at_extensions.optim import other"),
    "private": (PRIVATE, "publishing/plots.py", "from at_extensions.analysis import _resets"),
}


def lint(folder):
    """Check the contracts of ``folder/pyproject.toml``; return the linter's exit code and output."""
    done = subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def test_the_package_keeps_every_contract():
    code, output = lint(PACKAGE.parent)
    assert code == 0, output
    assert "3 kept, 0 broken" in output


@pytest.mark.parametrize("case", VIOLATIONS)
def test_a_violation_is_found(case, tmp_path):
    contract, file, line = VIOLATIONS[case]
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACKAGE.parent / "pyproject.toml", tmp_path)
    if case == "circle":
        (tmp_path / PACKAGE.name / "optim/other.py").write_text("from at_extensions.optim.deat import DEAT\n")
    with (tmp_path / PACKAGE.name / file).open("a") as source:
        source.write(f"\n{line}\n")
    code, output = lint(tmp_path)
    assert code == 1, output
    assert any(text.startswith(contract) and "BROKEN" in text for text in output.splitlines()), output
