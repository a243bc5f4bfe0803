"""Symmetric label noise: wrong labels drawn once, with a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from at_extensions.checks import check_count, check_labels, check_name, check_number

NOISE_KINDS = ("uniform", "other")
"""Which classes a corrupted label is drawn from."""


def corrupt_labels(
    labels: Tensor, num_classes: int, rate: float, *, kind: str = "uniform", generator: torch.Generator
) -> Tensor:
    """Return a copy of ``labels`` in which each was redrawn with probability ``rate``.

    ``"uniform"`` draws from all K classes, the true one included: the transition matrix
    (rate / K) 1 1^T + (1 - rate) I of "Exploring Memorization in Adversarial Training" (arXiv 2106.01606), under which
    a label is wrong with probability rate (K - 1) / K. ``"other"`` draws from the K - 1 wrong classes, so a label is
    wrong with probability ``rate``.

    Args:
        labels: True class numbers (N,).
        num_classes: K, at least 2.
        rate: Probability in [0, 1].
        kind: ``"uniform"`` or ``"other"``.
        generator: Source of randomness on the labels' device; the global one is not touched.

    Raises:
        TypeError: Labels that are not whole numbers, a rate that is not a number.
        ValueError: Labels or rate out of range, an unknown kind.
    """
    check_count("num_classes", num_classes, at_least=2)
    check_labels(labels, num_classes)
    check_number("label noise rate", rate, at_least=0, at_most=1)
    check_name("label noise kind", kind, NOISE_KINDS)
    redrawn = torch.rand(labels.shape, generator=generator, device=labels.device) < rate
    # A shift of the true label: by 0 to K - 1 for any class, by 1 to K - 1 for any other.
    shift = torch.randint(int(kind == "other"), num_classes, labels.shape, generator=generator, device=labels.device)
    return torch.where(redrawn, (labels + shift) % num_classes, labels)
