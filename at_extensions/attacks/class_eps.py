"""PGD with a radius of its own for each class, and RobustLT's radii for long-tailed classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from at_extensions.attacks.pgd import PGD
from at_extensions.checks import check_count, check_eps, check_number


def robust_lt_scales(class_counts: Sequence[int], strength: float = 0.3) -> list[float]:
    """Return each class's radius in units of eps, growing toward rare classes, as in RobustLT.

    With n_c training images of class c, N of all and a the strength:

        eps_c / eps = (1 - a) + tau sqrt(log(n_max / n_c)),    tau = a / sum_c (n_c / N) sqrt(log(n_max / n_c))

    so that the mean over training images is 1. With classes of equal size every scale is 1. RobustLT ramps the scales
    in during training; for that, set ``attack.scales`` in your loop.

    Args:
        class_counts: Training images of each class (K,), all at least 1.
        strength: a in [0, 1); 0 gives every class the same radius.

    Raises:
        TypeError: Not numbers.
        ValueError: A count below 1 or a strength outside [0, 1).
    """
    counts = [check_count(f"class_counts[{c}]", int(n)) for c, n in enumerate(class_counts)]
    check_number("strength", strength, at_least=0, below=1)
    rarity = [math.sqrt(math.log(max(counts) / n)) for n in counts]
    mean = sum(n * r for n, r in zip(counts, rarity)) / sum(counts)
    if mean == 0:
        return [1.0] * len(counts)
    return [1 - strength + strength / mean * r for r in rarity]


class ClassEpsPGD(PGD):
    """PGD in the ball of radius eps scales[y] around an image of class y; otherwise ``attacks.PGD``.

    Args:
        model: Classifier of images in [0, 1].
        scales: Each class's radius in units of eps (K,), such as ``robust_lt_scales(class_counts)``.
        eps: Linf radius in (0, 1]; eps times the largest scale must not exceed 1 either.
        alpha: Step size, the same for all classes.
        steps: Gradient steps, at least 1.
        start: ``"uniform"`` in the class's ball, ``"gaussian"`` or ``"zero"``.
        image_range: Range of the images.

    Attributes:
        scales: Tensor (K,); may be exchanged for another of its shape during training.

    Raises:
        ValueError: A number out of range, or scales that are not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        scales: Sequence[float],
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        start: str = "uniform",
        image_range: tuple[float, float] = (0.0, 1.0),
    ):
        super().__init__(model, eps, alpha, steps, start, image_range)
        scales = [check_number(f"scales[{c}]", float(s), above=0) for c, s in enumerate(scales)]
        if len(scales) < 2:
            raise ValueError(f"scales must hold one number a class, at least 2, got {len(scales)}")
        check_eps(self.eps * max(scales), name="eps times the largest scale")
        self.scales = torch.tensor(scales, dtype=torch.float64)

    def radius(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return each image's own radius (B, 1, 1, 1)."""
        if self.scales.device != images.device or self.scales.dtype != images.dtype:
            self.scales = self.scales.to(images)
        return (self.eps * self.scales[labels]).view(-1, *[1] * (images.ndim - 1))
