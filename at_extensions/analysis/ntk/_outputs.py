"""The outputs that a kernel compares: one class, each class, their sum, or all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from at_extensions.checks import check_name

NAMES = ("class", "trace", "sum", "all")


@dataclass(frozen=True)
class Outputs:
    """Backward passes of a kernel, and the way in which their results meet.

    Attributes:
        cotangents: One row (K,) a backward pass, (A, K).
        pairing: ``"merged"``: sum over passes, (N, M); ``"apart"``: each with itself, (A, N, M); ``"crossed"``: all
            pairs, (N, A, M, A).
    """

    cotangents: Tensor
    pairing: str

    @property
    def passes(self) -> int:
        """A: the number of backward passes."""
        return len(self.cotangents)

    @property
    def pairs(self) -> int:
        """Products of two passes' results for each pair of samples."""
        return self.passes**2 if self.pairing == "crossed" else self.passes


def check_outputs(outputs: int | str) -> int | str:
    """Return ``outputs`` if it is a class number or one of ``NAMES``.

    Raises:
        TypeError: Another kind of value.
        ValueError: An unknown name, or a negative class.
    """
    if isinstance(outputs, str):
        return check_name("outputs", outputs, NAMES)
    if isinstance(outputs, bool) or not isinstance(outputs, Integral):
        raise TypeError(f"outputs must be a class number or one of {', '.join(map(repr, NAMES))}, got {outputs!r}")
    if outputs < 0:
        raise ValueError(f"outputs must be a class number from 0, got {outputs}")
    return int(outputs)


def resolve_outputs(outputs: int | str, logits: Tensor) -> Outputs:
    """Return the backward passes for a model that returned ``logits``.

    Raises:
        ValueError: The logits are not (B, K), or the model has no such class.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = f"a tensor of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"the model must return one tensor of outputs (B, K), got {kind}")
    if logits.ndim != 2 or len(logits) != 1:
        raise ValueError(f"the model must return outputs (B, K); for one image it returned {tuple(logits.shape)}")
    number = logits.shape[1]
    if isinstance(outputs, int):
        if outputs >= number:
            raise ValueError(f"outputs must be a class from 0 to {number - 1} or a name, got {outputs}")
        rows, pairing = _rows([outputs], number), "merged"
    elif outputs == "sum":
        rows, pairing = torch.ones(1, number), "merged"
    else:
        rows = _rows(range(number), number)
        pairing = {"class": "apart", "trace": "merged", "all": "crossed"}[outputs]
    return Outputs(rows.to(logits), pairing)


def _rows(classes: Sequence[int], number: int) -> Tensor:
    return torch.eye(number)[list(classes)]
