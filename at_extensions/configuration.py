"""Dataclasses of settings: values from the command line, YAML and Python are converted and checked alike."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml


def option(default: Any = MISSING, help: str = "", **bounds: Any) -> Any:
    """Return a field with its help text.

    Args:
        default: Its default; without one the field is required.
        help: One sentence for ``--help`` and the docstring.
        **bounds: ``choices``, or the bounds of ``checks.check_number`` and ``checks.check_count``.
    """
    return field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass(frozen=True)
class Settings:
    """What the settings of all commands share: values are converted and checked when they are made."""

    def __init_subclass__(cls) -> None:
        found = [f for base in cls.__mro__[1:] for f in getattr(base, "__dataclass_fields__", {}).items()]
        found += [(name, f) for name, f in vars(cls).items() if isinstance(f, Field)]
        lines = [f"    {name}: {f.metadata['help']}" for name, f in dict(found).items()]
        cls.__doc__ = "\n".join([cls.__doc__, "", "Attributes:", *lines])

    def __post_init__(self) -> None:
        for f in fields(self):
            value = convert(f.name, kinds_of(type(self))[f.name], getattr(self, f.name))
            object.__setattr__(self, f.name, _bounded(f.name, value, **f.metadata["bounds"]))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Settings:
        """Return settings from plain data, such as a YAML file's; ``paper.title`` is a setting within another.

        Raises:
            ValueError: A name that is no setting (the nearest ones are named), a required one that is missing, or a
                value out of range.
            TypeError: A value of another kind.
        """
        from at_extensions.checks import check_name

        known = {f.name: f for f in fields(cls)}
        given = {check_name("setting", name, known): value for name, value in _unfolded(given).items()}
        missing = [name for name, f in known.items() if f.default is MISSING and name not in given]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; there is no default")
        return cls(**given)

    @classmethod
    def of(cls, settings: Settings | None, changes: Mapping[str, Any]) -> Settings:
        """Return ``settings`` with changes, or settings of the changes alone.

        Raises:
            TypeError, ValueError: As ``from_dict``; or ``settings`` is no object of this class.
        """
        if settings is None:
            return cls.from_dict(changes)
        if not isinstance(settings, cls):
            raise TypeError(f"settings must be {cls.__name__}, got {type(settings).__name__}")
        return replace(settings, **changes) if set(changes) <= kinds_of(cls).keys() else cls.from_dict(changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as plain data."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.to_dict() if isinstance(value, Settings) else value for name, value in values.items()}

    def arguments(self) -> list[str]:
        """Return the words of the command line that say what differs from the defaults."""
        words = []
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Settings):
                words += [w.replace("--", f"--{f.name}.", 1) if w.startswith("--") else w for w in value.arguments()]
            elif value != (list(f.default) if isinstance(f.default, tuple) else f.default):
                words += [flag(f.name), as_text(value)]
        return words


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a YAML mapping.
    """
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} does not hold a mapping of settings")
    return dict(given)


def flag(name: str) -> str:
    """Return a setting's name on the command line: ``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


@cache
def kinds_of(settings: type[Settings]) -> dict[str, Any]:
    """Return the type of each setting of a class."""
    hints = get_type_hints(settings)
    return {f.name: hints[f.name] for f in fields(settings)}


def flat_kinds(settings: type[Settings], prefix: str = "") -> dict[str, Any]:
    """Return the type of each setting, those of nested settings by names such as ``paper.title``."""
    found: dict[str, Any] = {}
    for name, kind in kinds_of(settings).items():
        found[prefix + name] = kind
        if isinstance(kind, type) and issubclass(kind, Settings):
            found |= flat_kinds(kind, f"{prefix}{name}.")
    return found


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def convert(name: str, kind: Any, value: Any) -> Any:
    """Return ``value`` as ``kind``: texts are read as the command line's, such as ``8/255``, ``true`` or ``1,2``.

    Raises:
        TypeError: A value of another kind.
        ValueError: A text that cannot be read.
    """
    kinds = alternatives(kind)
    if type(None) in kinds and (value is None or (isinstance(value, str) and value == "null")):
        return None
    kind = next(k for k in kinds if k is not type(None))
    if isinstance(kind, type) and issubclass(kind, Settings):
        return _nested(kind, value)
    if get_origin(kind) is list:
        items = _read(name, value, "[") if isinstance(value, str) else value
        items = items.split(",") if isinstance(items, str) else items
        items = list(items) if isinstance(items, (list, tuple)) else [items]
        return [convert(f"each of {name}", get_args(kind)[0], i.strip() if isinstance(i, str) else i) for i in items]
    if kind is dict:
        value = _read(name, value, "{") if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            raise TypeError(f'{name} must be a mapping such as {{"width": 16}}, got {value!r}')
        return dict(value)
    return _scalar(name, kinds, kind, value)


def _scalar(name: str, kinds: tuple, kind: type, value: Any) -> Any:
    from at_extensions.checks import parse_fraction

    if kind is bool:
        word = value.lower() if isinstance(value, str) else value
        if word in ("true", "false") or isinstance(value, bool):
            return word in ("true", True)
        if str in kinds and isinstance(value, str):
            return value
        raise TypeError(f"{name} must be true or false, got {value!r}")
    if kind is float:
        if isinstance(value, bool) or value is None:
            raise TypeError(f"{name} must be a number such as 0.1 or 8/255, got {value!r}")
        try:
            return parse_fraction(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if kind is int:
        if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return int(value)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        return int(value)
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name} must be a text, got {value!r}")
    return str(value)


def _unfolded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name; those such as ``paper.title`` are put into the mapping or YAML file ``paper``."""
    found: dict[str, Any] = {}
    for name, value in sorted(given.items(), key=lambda item: "." in item[0]):
        outer, _, inner = str(name).replace("-", "_").partition(".")
        found[outer] = _as_mapping(found.get(outer)) | {inner: value} if inner else value
    return found


def _as_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Settings):
        return value.to_dict()
    return read_yaml(value) if isinstance(value, (str, Path)) else dict(value or {})


def _nested(kind: type[Settings], value: Any) -> Settings:
    if isinstance(value, kind):
        return value
    return kind.from_dict(_as_mapping(value))


def _read(name: str, text: str, opening: str) -> Any:
    """Return the list or mapping in a text of JSON or YAML; any other text as it is."""
    if not text.strip().startswith(opening):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} cannot be read as JSON: {text!r}") from error


def _bounded(name: str, value: Any, *, choices: tuple = (), norm: str | None = None, **bounds: float) -> Any:
    from at_extensions.checks import check_count, check_eps, check_name, check_number

    if value is None:
        return None
    if choices:
        return check_name(name, value, choices)
    if norm is not None:
        return check_eps(value, norm, name=name)
    if bounds:
        return (check_count if isinstance(value, int) else check_number)(name, value, **bounds)
    return value


def as_text(value: Any) -> str:
    """Return a value as a word of the command line; a radius such as 8/255 as that fraction."""
    if isinstance(value, float):
        steps = f"{round(255 * value)}/255"
        return steps if round(255 * value) / 255 == value and len(steps) < len(repr(value)) else repr(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) and "," not in item for item in value):
        return ",".join(value)
    return value if isinstance(value, str) else json.dumps(value)
