"""Networks that a user's own code makes: named as ``package.module:factory``, copied beside a run, and made again."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import inspect
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from at_extensions.checks import unknown_name
from at_extensions.models import Normalized

SOURCES = "source"
"""The folder of a run directory that holds a copy of the factory's source files."""

_SPEC = re.compile(r"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|.+\.py):[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def is_factory(name: str) -> bool:
    """Whether a model's name is of the form ``package.module:factory`` or ``path/to/file.py:factory``."""
    return _SPEC.fullmatch(name) is not None


def build(
    name: str,
    num_classes: int,
    *,
    in_chans: int = 3,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Normalized, dict[str, Any]]:
    """Import a user's factory, from the current folder too, and make its network.

    Args:
        name: ``package.module:factory`` or ``path/to/file.py:factory``; a class or a function that returns a module.
        num_classes: Classes of the data; passed on where the factory has a parameter of that name without default.
        in_chans: Channels C of the images.
        mean: Subtracted from images in [0, 1], one number a channel; 0 if None.
        std: Divided by; 1 if None.
        options: Keyword arguments of the factory.

    Returns:
        The network, within the normalisation, and the record that ``rebuild`` makes it from: plain values for
        ``config.yaml``.

    Raises:
        ValueError: The factory cannot be imported or called, or mean and std do not fit the channels.
        TypeError: It does not return a module.
    """
    module_name, _, attribute = name.rpartition(":")
    root = Path.cwd()
    if module_name.endswith(".py"):
        path = Path(module_name)
        if not path.is_file():
            raise ValueError(f"no file {path} with a factory {attribute}")
        root, module_name = path.resolve().parent, path.stem
    options = dict(options or {})
    with _on_path(root):
        factory = _import(module_name, attribute)
        options = _required(factory, num_classes) | options
        network = _call(factory, options, name)
        module, attribute = _home(factory, module_name, attribute)
        record = {
            "name": attribute.rpartition(".")[2],
            "factory": f"{module.__name__}:{attribute}",
            "options": options,
            "num_classes": num_classes,
            "in_chans": in_chans,
            "mean": _per_channel("mean", mean, 0.0, in_chans),
            "std": _per_channel("std", std, 1.0, in_chans),
        }
        record |= _origin(module)
    return _normalized(network, record), record


def copy_sources(record: Mapping[str, Any], folder: Path, network: nn.Module) -> dict[str, Any]:
    """Copy a factory's source files to ``folder/source``, and return the record that names them.

    Where the copies alone do not make the same network, none are kept and the record says why: such a run is opened
    with the code that the current folder has.

    Args:
        record: Of ``build``.
        folder: The run directory.
        network: Of ``build`` too.
    """
    if "root" not in record:
        return dict(record)
    record = dict(record)
    root, target = Path(record.pop("root")), folder / SOURCES
    hashes = {}
    for name in record.pop("local"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target / name)
        hashes[name] = _sha256(target / name)
    for name in hashes:  # regular packages: a folder without __init__.py would yield to one of the same name elsewhere
        for package in list(Path(name).parents)[:-1]:
            if not (target / package / "__init__.py").exists():
                (target / package / "__init__.py").touch()
    copied = record | {"files": hashes}
    try:
        again = rebuild(copied, folder)
    except (ValueError, TypeError) as error:
        reason = str(error)
    else:
        if _layout(again) == _layout(network):
            return copied
        reason = "the copy makes another network"
    shutil.rmtree(target)
    return record | {"not_copied": reason}


def rebuild(record: Mapping[str, Any], folder: str | Path, seed: int | None = None) -> Normalized:
    """Make the network of a record anew, with fresh weights. **Runs the code** that the run directory holds or names.

    Args:
        record: The entry ``model`` of ``config.yaml``.
        folder: The run directory.
        seed: Draws the weights; the global random state does if None, and is as before either way.

    Raises:
        ValueError: The record is damaged, a source file was changed, or the code does not run.
        TypeError: The factory does not return a module.
    """
    try:
        module_name, _, attribute = record["factory"].partition(":")
        files, options = record.get("files") or {}, dict(record["options"])
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder}: config.yaml does not say how its model is made ({error!r})") from error
    source = Path(folder) / SOURCES
    for name, expected in files.items():
        if not (source / name).is_file() or _sha256(source / name) != expected:
            raise ValueError(f"{source / name} is missing or was changed since the evaluation; evaluate anew elsewhere")
    with importing_from(source, {module_name.partition(".")[0]}) if files else _on_path(Path.cwd()):
        network = _call(_import(module_name, attribute), options, record["factory"], seed)
    return _normalized(network, record)


def _normalized(network: nn.Module, record: Mapping[str, Any]) -> Normalized:
    return Normalized(network, record["mean"], record["std"], None)


def _import(module_name: str, attribute: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise ValueError(
            f"cannot import {module_name} ({type(error).__name__}: {error}); looked in {sys.path[0]} and among the "
            "installed packages"
        ) from error
    try:
        factory = attrgetter(attribute)(module)
    except AttributeError:
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise unknown_name(f"factory of {module_name}", attribute, known) from None
    if not callable(factory):
        raise TypeError(f"{module_name}:{attribute} is no class or function but a {type(factory).__name__}")
    return factory


def _call(factory: Any, options: Mapping[str, Any], name: str, seed: int | None = None) -> nn.Module:
    """Make a network; the global random state is as before afterwards."""
    try:
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.random.default_generator.manual_seed(seed)
            network = factory(**options)
    except Exception as error:
        given = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise ValueError(
            f"{name}({given}) failed ({type(error).__name__}: {error}); give its arguments as "
            "--model-options '{\"NAME\": VALUE}'"
        ) from error
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def _required(factory: Any, num_classes: int) -> dict[str, int]:
    """Return the number of classes where a factory cannot do without it."""
    try:
        parameter = inspect.signature(factory).parameters.get("num_classes")
    except (TypeError, ValueError):
        return {}
    return {"num_classes": num_classes} if parameter is not None and parameter.default is parameter.empty else {}


def _home(factory: Any, module_name: str, attribute: str) -> tuple[ModuleType, str]:
    """Return the module in which a factory is defined, and its name there: re-exports lead to it."""
    home, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "<")
    if home in sys.modules and "<" not in name:
        with contextlib.suppress(AttributeError):
            if attrgetter(name)(sys.modules[home]) is factory:
                return sys.modules[home], name
    return sys.modules[module_name], attribute


def _origin(module: ModuleType) -> dict[str, Any]:
    """Return where a module comes from: the package that it was installed with, or local source files."""
    file = getattr(module, "__file__", None)
    top = module.__name__.partition(".")[0]
    if file is None or not file.endswith(".py"):
        return {"not_copied": f"{module.__name__} has no source file"}
    path = Path(file).resolve()
    installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib", "platstdlib")]
    if top == "at_extensions" or any(folder in path.parents for folder in installed):
        return {"package": top}
    depth = len(module.__name__.split(".")) - (path.name != "__init__.py")
    root = path.parents[depth]
    return {"root": str(root), "local": sorted(_closure(path, root))}


def _closure(path: Path, root: Path) -> set[str]:
    """Return the files under ``root`` that a source file needs, itself included, by the imports that it writes out."""
    found, todo = set(), [path]
    while todo:
        file = todo.pop()
        name = file.relative_to(root).as_posix()
        if name in found:
            continue
        found.add(name)
        todo += _imported(file, root)
    return found


def _imported(file: Path, root: Path) -> list[Path]:
    """Return the files under ``root`` that a source file imports directly."""
    package = file.parent
    found = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found += [_file_of(root.joinpath(*alias.name.split("."))) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = root if node.level == 0 else [package, *package.parents][node.level - 1]
            base = start.joinpath(*(node.module or "").split(".")) if node.module else start
            parts = [_file_of(base / alias.name) for alias in node.names]
            found += parts if all(parts) else [*parts, _file_of(base)]
    return [path for path in found if path is not None]


def _file_of(base: Path) -> Path | None:
    for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Import from a folder first; modules imported meanwhile stay, the search path does not."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def importing_from(folder: Path, tops: set[str]) -> Iterator[None]:
    """Import from a folder of copies: modules of the same top-level names are set aside, and are back afterwards."""
    tops = tops | {path.stem for path in folder.iterdir()}

    def taken() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in tops}

    before, bytecode = taken(), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # a run directory holds sources alone
    try:
        with _on_path(folder):
            yield
    finally:
        taken()
        sys.modules.update(before)
        sys.dont_write_bytecode = bytecode


def _layout(network: nn.Module) -> dict[str, tuple]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in network.state_dict().items()}


def _per_channel(name: str, given: list[float] | None, default: float, in_chans: int) -> list[float]:
    values = [float(v) for v in (given if given is not None else [default] * in_chans)]
    if len(values) != in_chans:
        raise ValueError(f"{name} needs one number a channel ({in_chans}), got {len(values)}")
    if name == "std" and not all(v > 0 for v in values):
        raise ValueError(f"std must be positive, got {values}")
    return values


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
