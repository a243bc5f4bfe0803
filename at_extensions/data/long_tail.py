"""Long-tailed class counts, and the samples that a cut to them keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from at_extensions.checks import check_count, check_name, check_number
from at_extensions.data.split import ranks_in_class

TAIL_KINDS = ("exp", "step")
"""How class counts fall from the head to the tail."""

_ROUNDING = 1 + 1e-12  # 100 * 0.29 is 28.999999999999996 in floating point and means 29


def long_tail_counts(n_max: int, num_classes: int, imbalance_ratio: float, kind: str = "exp") -> list[int]:
    """Return how many samples each class keeps, class 0 being the largest.

    With C classes and r the ratio of the smallest class to the largest, ``"exp"`` gives
    n_c = floor(n_max r^(c / (C - 1))), as in REAT (arXiv 2307.10205) and the long-tailed CIFAR sets before it;
    ``"step"`` gives n_max to the first half of the classes (rounded up) and floor(n_max r) to the others.

    Args:
        n_max: Samples of the largest class.
        num_classes: C, at least 2.
        imbalance_ratio: r in (0, 1].
        kind: ``"exp"`` or ``"step"``.

    Raises:
        TypeError: Not numbers.
        ValueError: A ratio outside (0, 1], an unknown kind, or a class that would be left without samples.
    """
    check_count("n_max", n_max)
    counts = [int(n_max * share * _ROUNDING) for share in _shares(num_classes, imbalance_ratio, kind)]
    if min(counts) == 0:
        raise ValueError(
            f"imbalance_ratio={imbalance_ratio:g} leaves class {counts.index(0)} of {num_classes} without samples when "
            f"the largest has {n_max}; use at least {1 / n_max:.2g}"
        )
    return counts


def largest_head(available: Sequence[int], imbalance_ratio: float, kind: str = "exp") -> int:
    """Return the largest n_max with which every class c can meet its count: floor(n_max share_c) <= available_c.

    With classes of equal size this is that size. Otherwise the whole profile is scaled down until it fits, so that
    the ratio asked for is the ratio that comes out.
    """
    shares = _shares(len(available), imbalance_ratio, kind)
    return min(math.ceil((n + 1) / (share * _ROUNDING)) - 1 for n, share in zip(available, shares))


def frequency_groups(class_counts: Sequence[int]) -> dict[str, list[int]]:
    """Return the classes that are ``head``, ``medium`` and ``tail``: thirds by rank of their count, largest first.

    As in REAT's released code, with K classes the head holds the first floor(K/3) + 1 places and the tail those from
    place 2 floor(K/3) + 1 on, counting from 0. Three classes have no tail by this rule; two have the rarer one.
    """
    ranked = sorted(range(len(class_counts)), key=lambda c: -int(class_counts[c]))
    third = len(ranked) // 3
    return {"head": ranked[: third + 1], "medium": ranked[third + 1 : 2 * third + 1], "tail": ranked[2 * third + 1 :]}


def is_long_tailed(class_counts: Sequence[int]) -> bool:
    """Return whether the smallest class has samples, but less than half as many as the largest."""
    return 0 < 2 * min(class_counts) < max(class_counts)


def kept_samples(labels: Tensor, counts: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return the sorted indices of the first ``counts[c]`` of a shuffle of each class c of ``labels`` (N,)."""
    ranks = ranks_in_class(labels, len(counts), generator)
    return (ranks < torch.tensor(counts)[labels]).nonzero().squeeze(1)


def _shares(num_classes: int, imbalance_ratio: float, kind: str) -> list[float]:
    """Sizes of the classes relative to the largest."""
    check_count("num_classes", num_classes, at_least=2)
    check_number("imbalance_ratio", imbalance_ratio, above=0, at_most=1)
    check_name("imbalance kind", kind, TAIL_KINDS)
    if kind == "step":
        head = (num_classes + 1) // 2
        return [1.0] * head + [imbalance_ratio] * (num_classes - head)
    return [imbalance_ratio ** (c / (num_classes - 1)) for c in range(num_classes)]
