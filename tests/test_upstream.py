"""The served ``autoattack`` module: there when needed, and only then."""

import subprocess
import sys

import pytest

from at_extensions import upstream


def run(code, **environment):
    """Run code in a fresh interpreter; return its output, or its error."""
    import os

    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return result.stdout.strip() if result.returncode == 0 else result.stderr


def test_importing_the_package_loads_neither_torch_nor_the_attacks():
    code = "import sys, at_extensions; print([m for m in ('torch', 'pyautoattack', 'autoattack') if m in sys.modules])"
    assert run(code) == "[]"


def test_robustbench_imports_once_the_package_is():
    code = "import at_extensions\nfrom robustbench.eval import benchmark\nprint(benchmark.__name__)"
    assert run(code) == "benchmark"
    assert "No module named 'autoattack'" in run("import autoattack")  # without us


def test_a_real_autoattack_has_precedence(tmp_path):
    package = tmp_path / "autoattack"
    package.mkdir()
    (package / "__init__.py").write_text("AutoAttack = 'the real one'\n")
    (package / "square.py").write_text("SquareAttack = 'the real Square'\n")
    (package / "autopgd_base.py").touch()
    code = (
        "import at_extensions\nfrom at_extensions import upstream\nimport autoattack\n"
        "print(autoattack.AutoAttack, upstream.backend(), upstream.attack_module('square').SquareAttack)\n"
        "import autoattack.state\n"
    )
    outcome = run(code, PYTHONPATH=str(tmp_path))
    assert "No module named 'autoattack.state'" in outcome  # modules that the real one lacks are not added
    assert run(code.rsplit("import", 1)[0], PYTHONPATH=str(tmp_path)) == "the real one autoattack the real Square"


@pytest.mark.parametrize("kind", ["script", "folder"])
def test_an_unrelated_module_of_that_name_is_no_backend(tmp_path, kind):
    if kind == "script":
        (tmp_path / "autoattack.py").write_text("print('my experiments')\n")
    else:
        (tmp_path / "autoattack").mkdir()
    (tmp_path / "pyautoattack").mkdir()
    (tmp_path / "pyautoattack" / "square.py").touch()  # in place of the installed one, which imports torch
    code = "from at_extensions import upstream\nprint(upstream.attack_module('square').__name__)"
    assert run(code, PYTHONPATH=str(tmp_path)) == "pyautoattack.square"


def test_the_finder_is_appended_once():
    upstream.serve_autoattack()
    upstream.serve_autoattack()
    finders = [finder for finder in sys.meta_path if type(finder).__module__ == upstream.__name__]
    assert len(finders) == 1
    assert sys.meta_path.index(finders[0]) > 2  # after the interpreter's own


def test_every_module_of_attacks_is_served():
    import autoattack
    import autoattack.autoattack
    import autoattack.autopgd_base
    import autoattack.state
    import pyautoattack.autopgd_base
    from autoattack.fab_pt import FABAttack_PT
    from autoattack.other_utils import L2_norm
    from autoattack.square import SquareAttack

    assert autoattack.autoattack.AutoAttack is autoattack.AutoAttack
    assert autoattack.autopgd_base.APGDAttack is pyautoattack.autopgd_base.APGDAttack
    assert autoattack.checks.check_randomized is pyautoattack.checks.check_randomized  # as upstream's __init__ does
    assert {FABAttack_PT.__name__, SquareAttack.__name__, L2_norm.__name__} == {
        "FABAttack_PT",
        "SquareAttack",
        "L2_norm",
    }
    assert upstream.backend_version().startswith("pyautoattack ")


def test_missing_modules_are_not_served():
    import autoattack

    with pytest.raises(ModuleNotFoundError, match=r"autoattack\.nonsense"):
        import autoattack.nonsense
    with pytest.raises(ModuleNotFoundError, match="autoattack2"):
        import autoattack2  # noqa: F401
    with pytest.raises(AttributeError, match="nonsense"):
        autoattack.nonsense  # noqa: B018
