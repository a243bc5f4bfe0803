"""The names of the methods, for the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from at_extensions.checks import check_name, unknown_name
from at_extensions.methods.method import Method

_METHODS: dict[str, tuple[Callable[..., Method], str]] = {}


def register(name: str, description: str) -> Callable:
    """Give a method (a class or a function that makes one) its name on the command line."""

    def decorate(factory: Callable[..., Method]) -> Callable[..., Method]:
        _METHODS[name] = (factory, description)
        return factory

    return decorate


def list_methods() -> dict[str, str]:
    """Return every method's name with a one-line description."""
    return {name: description for name, (_, description) in sorted(_METHODS.items())}


def method_options(name: str) -> list[str]:
    """Return the names of a method's options.

    Raises:
        ValueError: Unknown name; the nearest ones are named.
    """
    factory = _METHODS[check_name("method", name, _METHODS)][0]
    return [p for p in inspect.signature(factory).parameters if p != "model"]


def create_method(name: str, model: nn.Module, *, offered: dict | None = None, **options) -> Method:
    """Build a method by name.

    Args:
        name: From ``list_methods()``.
        model: Classifier of images in [0, 1] that returns logits (B, K).
        offered: Values that are used where the method takes an option of that name and none was given; the others
            are left out (a run offers ``eps``, ``seed`` and ``class_counts`` to every method).
        **options: The method's own, such as ``eps=8/255, alpha=2/255, steps=10``.

    Raises:
        ValueError: Unknown name or option; the nearest ones are named.
    """
    known, factory = method_options(name), _METHODS[name][0]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of method {name!r}", option, known)
    return factory(model, **{key: value for key, value in (offered or {}).items() if key in known} | options)
