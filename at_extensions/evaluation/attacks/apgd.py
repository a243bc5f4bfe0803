"""APGD that lets go of images once they are fooled: the same verdicts as AutoAttack's, in less time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from at_extensions.evaluation.verification import margin
from at_extensions.upstream import attack_module

MARGIN = 0.1
"""By how many standard deviations of an image's logits another class must lead before the image is let go.

A fast model's logits are within a thousandth of the given one's in float32, and within a few hundredths in bfloat16, so
the model as given will agree."""

_SETTLED = 50.0  # a logit so large that cross-entropy, and its gradient, are next to none


class Standing:
    """A classifier that is asked for the images alone that it has not been fooled on; for a single run of APGD.

    APGD keeps an adversarial example when it meets one, and goes on with the image all the same: the verdict cannot
    change any more. Here an image that another class leads on by ``MARGIN`` is answered, from the next call on, with
    constant logits for its own class, which APGD takes for an iterate that found nothing.

    Args:
        model: Classifier of images (B, C, H, W) that returns logits (B, K), each image's independent of the others.
        y: Classes of the images that every call brings, in this order (B,).

    Attributes:
        rows: Which of them stand; the last one to fall stays.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], y: Tensor):
        self.model, self.y = model, y
        self.rows = torch.arange(len(y), device=y.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        rows = self.rows
        if len(rows) == len(x):
            logits = asked = self.model(x)
        else:
            asked = self.model(x[rows])
            settled = asked.new_zeros(len(x), asked.shape[1]).scatter(1, self.y.unsqueeze(1), _SETTLED)
            logits = settled.index_copy(0, rows, asked)
        stands = ~fooled_beyond_doubt(asked.detach(), self.y[rows])
        if not stands.all():
            self.rows = rows[stands] if stands.any() else rows[:1]  # a model may not like to be asked of no image
        return logits


def fooled_beyond_doubt(logits: Tensor, y: Tensor) -> Tensor:
    """Return on which images another class leads by ``MARGIN`` (B,), of logits (B, K) and their classes (B,)."""
    return -margin(logits, y) > MARGIN * logits.std(1)


def _letting_go(original: type) -> type:
    """Return a subclass of one of upstream's APGD attacks that asks for standing images alone."""

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.eot_iter > 1 or self.use_largereps:  # one draw is no proof; a larger ball's points are only starts
            return original.attack_single_run(self, x, y, x_init=x_init)
        model, self.model = self.model, Standing(self.model, y)
        try:
            return original.attack_single_run(self, x, y, x_init=x_init)
        finally:
            self.model = model

    return type(original.__name__, (original,), {"attack_single_run": attack_single_run, "__doc__": original.__doc__})


def attack_classes() -> tuple[type, type]:
    """Return upstream's ``APGDAttack`` and ``APGDAttack_targeted``, for whom verdicts are all that counts.

    What ``perturb`` returns fools the model on the same images, but not by as much as upstream's, whose attacks go on;
    points of highest loss (``best_loss=True``) are those met until an image is let go. Upstream itself stays as it is.
    """
    module = attack_module("autopgd_base")
    return _letting_go(module.APGDAttack), _letting_go(module.APGDAttack_targeted)
