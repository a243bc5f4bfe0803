"""APGD that discards images once they are fooled: the same verdicts as AutoAttack's, in less time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from at_extensions.evaluation.verification import margin
from at_extensions.upstream import attack_module

MARGIN = 0.1
"""Lead of another class, in standard deviations of an image's logits, from which on the image is discarded.

A fast model's logits are within a thousandth of the given one's in float32, and within a few hundredths in bfloat16, so
the model as given will agree."""

_SETTLED = 50.0  # a logit so large that cross-entropy, and its gradient, are next to none


class Discarding:
    """A classifier that is evaluated on the images alone that it has not been fooled on; for a single run of APGD.

    APGD keeps an adversarial example once it meets one, and continues with the image although the verdict cannot change
    any more. Here, an image on which another class leads by ``MARGIN`` gets, from the next call on, constant logits for
    its own class, which APGD takes for an iterate that found nothing.

    Args:
        model: Classifier of images (B, C, H, W) that returns logits (B, K), each image's independent of the others.
        y: Classes of the images that every call brings, in this order (B,).

    Attributes:
        rows: Numbers of the images that are not fooled; at least one remains.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], y: Tensor):
        self.model, self.y = model, y
        self.rows = torch.arange(len(y), device=y.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        rows = self.rows
        if len(rows) == len(x):
            logits = evaluated = self.model(x)
        else:
            evaluated = self.model(x[rows])
            settled = evaluated.new_zeros(len(x), evaluated.shape[1]).scatter(1, self.y.unsqueeze(1), _SETTLED)
            logits = settled.index_copy(0, rows, evaluated)
        robust = ~is_clearly_fooled(evaluated.detach(), self.y[rows])
        if not robust.all():
            self.rows = rows[robust] if robust.any() else rows[:1]  # not every model takes an empty batch
        return logits


def is_clearly_fooled(logits: Tensor, y: Tensor) -> Tensor:
    """Whether another class leads by ``MARGIN`` on each image (B,), from logits (B, K) and classes (B,)."""
    return -margin(logits, y) > MARGIN * logits.std(1)


def _discarding(original: type) -> type:
    """Return a subclass of one of upstream's APGD attacks that evaluates the model on images not yet fooled alone."""

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.eot_iter > 1 or self.use_largereps:  # one draw proves nothing; points of a larger ball are only starts
            return original.attack_single_run(self, x, y, x_init=x_init)
        model, self.model = self.model, Discarding(self.model, y)
        try:
            return original.attack_single_run(self, x, y, x_init=x_init)
        finally:
            self.model = model

    return type(original.__name__, (original,), {"attack_single_run": attack_single_run, "__doc__": original.__doc__})


def attack_classes() -> tuple[type, type]:
    """Return upstream's ``APGDAttack`` and ``APGDAttack_targeted``, reduced to their verdicts.

    The images that ``perturb`` returns fool the model wherever upstream's do, but by a smaller margin, because upstream
    continues to increase the loss; points of highest loss (``best_loss=True``) are those found until an image is
    discarded. Upstream's classes themselves are not changed.
    """
    module = attack_module("autopgd_base")
    return _discarding(module.APGDAttack), _discarding(module.APGDAttack_targeted)
