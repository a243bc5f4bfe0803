"""Arithmetic of an evaluation: the precision of the search, and the settings of torch that decide float32 results."""

from __future__ import annotations

import functools
import warnings

import torch

from at_extensions.checks import check_name

PRECISIONS = ("fp32", "bf16")
"""Precisions that attacks search in; verdicts are float32's either way."""


def check_precision(name: str, precision: str, device: torch.device) -> str:
    """Return ``precision`` if it is one of ``PRECISIONS``; warn once where it is slower than fp32 on this machine.

    Raises:
        ValueError: An unknown precision.
    """
    check_name(name, precision, PRECISIONS)
    if precision == "bf16" and device.type == "cpu" and not _has_bf16_instructions():
        _warn_of_slow_bf16()
    return precision


def arithmetic(device: torch.device) -> list[str]:
    """Return the device type, and torch's settings of float32 precision in matrix products and convolutions on it."""
    cuda, cudnn, onednn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    if not hasattr(cuda, "fp32_precision"):  # newer versions of torch have others, and may refuse these
        settings = (torch.get_float32_matmul_precision(), cuda.allow_tf32, cudnn.allow_tf32)
    elif device.type == "cuda":
        settings = (cuda.fp32_precision, cudnn.conv.fp32_precision)
    else:
        settings = (onednn.matmul.fp32_precision, onednn.conv.fp32_precision)
    return [device.type, *("ieee" if setting == "none" else str(setting) for setting in settings)]


def rounding(device: torch.device) -> float:
    """Return a bound on how far two float32 computations of one logit differ, as a share of the logits' spread.

    TF32, which convolutions use on a GPU by default, has 10 bits of mantissa instead of 23.
    """
    return 1e-3 if device.type == "cpu" else 2e-2


def _has_bf16_instructions() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or supported()


@functools.cache
def _warn_of_slow_bf16() -> None:
    warnings.warn(
        "this CPU has no bfloat16 instructions, so a search in bf16 is slower than one in fp32; use fp32 here",
        RuntimeWarning,
        stacklevel=4,
    )
