"""The seam between twins and the kernels that make their layers faster: everything works without them.

A backend is a folder beside this file with ``accelerate(network) -> list`` and ``CONVOLUTIONS``; there is one,
``folding/cpu``. The environment variable ``AT_EXTENSIONS_KERNELS=0`` turns all kernels off; a twin reads it when it is
built.
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import nn

VARIABLE = "AT_EXTENSIONS_KERNELS"


def kernels_enabled() -> bool:
    """Whether twins that are built now use kernels.

    Raises:
        ValueError: The environment variable is neither ``0`` nor ``1``.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 (no kernels) or 1, got {value!r}")
    return value == "1"


def accelerate(network: nn.Module) -> list[nn.Module]:
    """Let layers of a twin's network take faster ways, in place, if kernels are enabled and installed.

    A layer that becomes another type computes the same up to rounding, on every device and under every transform, and
    keeps its attributes, parameters and buffers.

    Args:
        network: The twin's copy of a model, its weights frozen.

    Returns:
        Layers that keep something computed of their weights: their ``forget()`` is to be called when these change.
    """
    backend = _backend() if kernels_enabled() else None
    return [] if backend is None else backend.accelerate(network)


def convolution_types() -> tuple[type[nn.Conv2d], ...]:
    """Return the types that a twin's ``nn.Conv2d`` may have: itself, and those of the installed backend."""
    backend = _backend()
    return (nn.Conv2d,) if backend is None else (nn.Conv2d, *backend.CONVOLUTIONS)


def _backend() -> ModuleType | None:
    try:
        from at_extensions.folding import cpu
    except ImportError:
        return None
    return cpu if hasattr(cpu, "accelerate") else None  # an empty folder is imported too
