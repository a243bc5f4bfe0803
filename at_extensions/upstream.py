"""Serve a module called ``autoattack`` where none is installed, so that robustbench can be imported unchanged."""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_HOME = "at_extensions.evaluation.served"  # upstream's interface to our evaluation; imported at first use
_REST = "pyautoattack"  # the attacks themselves, with upstream's modules


def serve_autoattack() -> None:
    """Append the finder that serves ``autoattack``; does nothing if it is there already.

    The finder is the last on ``sys.meta_path``, so an installed ``autoattack`` has precedence. Nothing is loaded before
    ``autoattack`` is imported. Then ``autoattack``, ``autoattack.autoattack`` and ``autoattack.state`` are ours, with
    upstream's interface; ``autoattack.autopgd_base``, ``fab_pt``, ``square`` and the other modules of attacks have the
    contents of ``pyautoattack``'s.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def backend() -> str:
    """Return the package whose attacks are run: a real ``autoattack`` where one is installed, else ``pyautoattack``."""
    spec = importlib.util.find_spec("autoattack")
    if spec is None or isinstance(spec.loader, _Copy):
        return _REST
    # a user's own autoattack.py, or a folder of results of that name, is not upstream
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return "autoattack" if any((folder / "autopgd_base.py").is_file() for folder in folders) else _REST


def backend_version() -> str:
    """Return the backend's name and version, such as ``"pyautoattack 0.2.0"``."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{backend()} {version(backend())}"
    except PackageNotFoundError:  # on the path without being installed
        return backend()


def attack_module(name: str) -> ModuleType:
    """Import the backend's module ``name``: ``"autopgd_base"``, ``"fab_pt"``, ``"square"`` or ``"other_utils"``."""
    return import_module(f"{backend()}.{name}")


class _Finder(MetaPathFinder):
    """Finds ``autoattack`` and its modules where no other finder does."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package != "autoattack":
            return None
        if not rest:
            return ModuleSpec(fullname, _Copy(_HOME), is_package=True)
        if not isinstance(getattr(sys.modules[package].__spec__, "loader", None), _Copy):
            return None  # a module that the real package lacks
        for home in (f"{_HOME}.{rest}", f"{_REST}.{rest}"):
            if _exists(home):
                return ModuleSpec(fullname, _Copy(home))
        return None


class _Copy(Loader):
    """Fills a module with the contents of another one."""

    def __init__(self, home: str):
        self.home = home

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None: the import system creates the module."""

    def exec_module(self, module: ModuleType) -> None:
        home = import_module(self.home)
        module.__doc__ = home.__doc__
        names = getattr(home, "__all__", [name for name in vars(home) if not name.startswith("__")])
        module.__dict__.update({name: getattr(home, name) for name in names})
        if module.__spec__.submodule_search_locations is not None:
            module.__getattr__ = _submodule_of(module.__name__)


def _submodule_of(package: str):
    """A module's ``__getattr__`` that imports ``package.name``: upstream's package loads its own modules."""

    def load(name: str) -> ModuleType:
        try:
            return import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from error

    return load


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False
