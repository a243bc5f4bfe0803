"""Changes of a model that no tensor shows: its modules' plain attributes, their classes, and the globals they read.

A twin runs copies of a model's modules. Whatever their forward passes read beside tensors (a slope, an activation
function, a switch in a dictionary, a method that was replaced) must be noticed when it changes in the model.
"""

from __future__ import annotations

import enum
import logging
import types
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_TORCHS = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}  # of every module: tensors, submodules, hooks, modes
_ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, range, slice)
_ALIKE = (  # compared by identity
    enum.Enum,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    nn.Module,
    Tensor,
    torch.Generator,
    logging.Logger,
)
_DEPTH, _ITEMS = 6, 2_000  # how deep, and how many values of one attribute, are compared
_MISSING = object()


class _Same:
    """A value that is equal to itself alone."""

    __slots__ = ("value",)

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None


class _Seen(NamedTuple):
    """A name in a dictionary, with the value it had.

    Attributes:
        space: The dictionary.
        name: Its key.
        value: The value itself, which keeps it alive.
        frozen: A copy to compare with, unless the value cannot change in place: None.
    """

    space: Any
    name: str
    value: object
    frozen: object

    def is_current(self) -> bool:
        """Whether the name has an equal value now."""
        now = self.space.get(self.name, _MISSING)
        if now is self.value:
            return self.frozen is None or _frozen(now) == self.frozen
        return type(now) is type(self.value) and _frozen(now) == (self.frozen or _frozen(self.value))


class Watch:
    """Remembers what a model's forward pass may read beside parameters, buffers, submodules and hooks.

    Compared are the attributes of every module (containers and objects by their content), its class, the attributes of
    that class, and the globals, enclosing variables and attributes of globals that the class's functions name. Not
    followed are functions of torch, and what C code reads. A copy of a watch has seen nothing, so that its twin is
    built anew.

    Args:
        pairs: Every module of the model with its copy in the twin.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]] = ()):
        self._modules = [_Attributes(live, twin) for live, twin in pairs]
        self._outside = list(_outside([entry.live for entry in self._modules]))

    def follow(self) -> bool:
        """Take changed attributes over where nothing else depends on them; return whether that was enough."""
        if not self._modules or not all(seen.is_current() for seen in self._outside):
            return False
        return all([entry.follow() for entry in self._modules])  # noqa: C419  # all of them, not up to the first

    def __reduce__(self) -> tuple:
        return Watch, ()


class _Attributes:
    """The plain attributes of one module, and of its copy."""

    def __init__(self, live: nn.Module, twin: nn.Module):
        self.live, self.twin, self.kind = live, twin, type(live)
        # a trace does not look into such a module, so that no choice of what folds depends on its attributes
        self.is_opaque = not any(isinstance(m, (nn.modules.conv._ConvNd, _BatchNorm)) for m in live.modules())
        self._look()

    def _look(self) -> None:
        space = vars(self.live)
        self.size = len(space)
        names = [name for name in space if name not in _TORCHS]
        self.tensors = [name for name in names if isinstance(space[name], Tensor)]
        self.shared = [name for name in names if _is_unknown(space[name])]
        apart = {*self.tensors, *self.shared}
        self.plain = [_seen(space, name) for name in names if name not in apart]

    def follow(self) -> bool:
        space, copies = vars(self.live), vars(self.twin)
        if type(self.live) is not self.kind or len(space) != self.size:
            return False
        for name in chain(self.tensors, self.shared):
            value = space.get(name, _MISSING)
            if value is _MISSING or isinstance(value, Tensor) != (name in self.tensors):
                return False
            copies[name] = value.detach() if isinstance(value, Tensor) else value
        for number, seen in enumerate(self.plain):
            if not seen.is_current():
                if not (self.is_opaque and type(space.get(seen.name)) in _ATOMS and type(seen.value) in _ATOMS):
                    return False
                copies[seen.name] = space[seen.name]
                self.plain[number] = _seen(space, seen.name)
        return True


_BatchNorm = nn.modules.batchnorm._BatchNorm


def _seen(space: Any, name: str) -> _Seen:
    value = space[name]
    return _Seen(space, name, value, None if _is_fixed(value) else _frozen(value))


def _is_fixed(value: object) -> bool:
    """Whether a value cannot change in place, or is compared by identity."""
    if type(value) in (tuple, frozenset, torch.Size):
        return all(map(_is_fixed, value))
    return isinstance(value, (*_ATOMS, *_ALIKE))


def _is_unknown(value: object) -> bool:
    """Whether a value may change in place without a way to see it; the twin then holds the model's own."""
    return not _is_fixed(value) and _frozen(value) == _Same(value)


def _frozen(value: object) -> object:
    """Return a copy of a value that equals another one's where both have the same content."""
    return _freeze(value, _DEPTH, [_ITEMS])


def _freeze(value: object, depth: int, left: list[int]) -> object:
    kind = type(value)
    left[0] -= 1
    if kind in _ATOMS:
        return kind, repr(value) if kind in (float, complex) else value  # -0.0 is not 0.0, NaN is NaN
    if isinstance(value, _ALIKE) or depth == 0 or left[0] <= 0:
        return _Same(value)
    if kind is types.MethodType:
        return kind, _Same(value.__func__), _Same(value.__self__)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return kind, [_freeze(item, depth - 1, left) for item in items], _of_object(value, depth, left)
    if isinstance(value, dict):
        items = [(_freeze(k, depth - 1, left), _freeze(v, depth - 1, left)) for k, v in value.items()]
        return kind, items, _of_object(value, depth, left)
    if hasattr(value, "tobytes") and getattr(value, "nbytes", _ITEMS) < _ITEMS:  # an array
        return kind, value.tobytes(), getattr(value, "shape", None)
    if kind.__module__ == "functools" and hasattr(value, "func"):
        return kind, *(_freeze(part, depth - 1, left) for part in (value.func, value.args, value.keywords))
    inner = _of_object(value, depth, left)
    return _Same(value) if inner is None else (kind, inner)


def _of_object(value: object, depth: int, left: list[int]) -> list | None:
    """Return the frozen attributes of an object, if it has any that can be read."""
    slots = [s for c in type(value).__mro__ for s in _listed(c.__dict__.get("__slots__", ())) if hasattr(value, s)]
    space = getattr(value, "__dict__", None)
    if not slots and not isinstance(space, dict):
        return None
    items = [*(space or {}).items(), *((s, getattr(value, s)) for s in slots)]
    return [(name, _freeze(part, depth - 1, left)) for name, part in items]


def _listed(slots: object) -> tuple:
    return (slots,) if isinstance(slots, str) else tuple(s for s in slots if not s.startswith("__"))


# --- classes, and what their functions name ---------------------------------------------------------------------------


def _outside(modules: list[nn.Module]) -> Iterator[_Seen]:
    """Yield what the forward passes of modules name outside of them."""
    functions: list[types.FunctionType] = []
    done: set[tuple[int, str]] = set()
    for kind in {base for module in modules for base in _own_classes(type(module))}:
        yield from _once(vars(kind), [n for n in vars(kind) if not n.startswith("__") or n == "__call__"], done)
        yield _Seen(_Sizes(kind), "size", len(vars(kind)), None)
        functions += _functions_in(vars(kind).values())
    for module in modules:
        for value in vars(module).values():
            functions += _functions_in([value, *(v for c in _own_classes(type(value)) for v in vars(c).values())])
    known: set[types.CodeType] = set()
    while functions:
        function = functions.pop()
        if function.__code__ in known or function.__module__ is None or _is_torchs(function.__module__):
            continue
        known.add(function.__code__)
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        spaces = [function.__globals__]
        found = [function.__globals__[name] for name in names if name in function.__globals__]
        for cell in function.__closure__ or ():
            spaces.append(_Cell(cell))
            found += [value] if (value := _Cell(cell).get("cell")) is not None else []
        spaces += [vars(v) for v in found if isinstance(getattr(v, "__dict__", None), dict) and not _is_module(v)]
        for space in spaces:
            yield from _once(space, ["cell"] if isinstance(space, _Cell) else sorted(names), done)
        for space in (function.__globals__, *(vars(v) for v in found if hasattr(v, "__dict__"))):
            functions += _functions_in(space[name] for name in names if name in space)
        functions += _functions_in(found)


def _once(space: Any, names: Iterable[str], done: set[tuple[int, str]]) -> Iterator[_Seen]:
    for name in names:
        if space.get(name, _MISSING) is not _MISSING and (id(space), name) not in done:
            done.add((id(space), name))
            yield _seen(space, name)


class _Cell:
    """A variable of an enclosing function, read as a dictionary's value."""

    def __init__(self, cell: types.CellType):
        self._cell = cell

    def get(self, name: str, default: object = None) -> object:
        try:
            return self._cell.cell_contents
        except ValueError:  # not assigned yet
            return default

    def __getitem__(self, name: str) -> object:
        return self.get(name)


class _Sizes:
    """How many attributes a class has, read as a dictionary's value."""

    def __init__(self, kind: type):
        self._kind = kind

    def get(self, name: str, default: object = None) -> int:
        return len(vars(self._kind))


def _own_classes(kind: type) -> list[type]:
    """Return a class and its bases that are neither torch's nor Python's."""
    return [base for base in kind.__mro__ if not _is_torchs(base.__module__) and base.__module__ != "builtins"]


def _is_torchs(name: str) -> bool:
    return name.split(".")[0] in ("torch", "torchvision", "numpy", "builtins", "functools", "typing")


def _is_module(value: object) -> bool:
    return isinstance(value, nn.Module)


def _functions_in(values: Iterable[object]) -> list[types.FunctionType]:
    found = []
    for value in values:
        for part in (value, *(getattr(value, a, None) for a in ("__func__", "fget", "__wrapped__", "func"))):
            if isinstance(part, types.FunctionType):
                found.append(part)
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)
