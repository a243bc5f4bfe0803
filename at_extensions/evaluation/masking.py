"""Detection of masked gradients by two short attacks."""

from __future__ import annotations

import torch
from torch import Tensor

from at_extensions.evaluation.attacks import apgd
from at_extensions.evaluation.flags import Flag, Predict, Warnings
from at_extensions.evaluation.verification import ORDER, fooled

SAMPLES = 64
"""Largest number of images that the checks use."""


def unbounded(
    model: Predict, x: Tensor, y: Tensor, norm: str, *, left: float = 0.1, search: Predict | None = None
) -> Flag | None:
    """Return a flag if a gradient attack fails within a ball that holds uniform grey for every image.

    With a radius of half the box in every pixel no model is robust; images that remain correct show gradients that do
    not lead to the model's errors (Carlini et al. 2019, arXiv 1902.06705, section 5).

    Args:
        model: The model as given.
        x: Images that it classifies correctly (B, C, H, W).
        y: Their classes (B,).
        norm: Threat model.
        left: Largest share of them that may remain correct.
        search: The model whose gradients are followed; the model itself if None.
    """
    if len(x) == 0:
        return None
    eps = 0.5 * x[0].numel() ** (1 / ORDER[norm])
    x_adv = _apgd(model if search is None else search, x, y, norm, eps)[3]
    correct = int((model(x_adv).argmax(1) == y).sum())
    if correct <= max(1, left * len(x)):
        return None
    return Flag(
        "gradient_masking",
        f"APGD without a bound fails on {correct} of {len(x)} images: the gradients do not lead to the model's "
        "errors, so gradient-based attacks overestimate its robustness",
    )


def transfer(
    model: Predict,
    x: Tensor,
    y: Tensor,
    norm: str,
    eps: float,
    *,
    share: float = 0.03,
    search: Predict | None = None,
) -> Flag | None:
    """Return a flag if adversarial examples of a smoothed surrogate fool the model where white-box attacks did not.

    The surrogate is the model under Gaussian noise of half the ball's size. Its averaged gradient is not affected by
    small oscillations that shatter the model's own (Tramer et al. 2020, arXiv 2002.08347, on k-WTA).

    Args:
        model: The model as given.
        x: Robust images (B, C, H, W).
        y: Their classes (B,).
        norm: Threat model.
        eps: Its radius.
        share: Largest share of them that may be fooled.
        search: The model that is smoothed; the model itself if None.
    """
    if len(x) == 0:
        return None
    sigma = eps / (2 * x[0].numel() ** (1 / ORDER[norm]))
    predict = model if search is None else search
    x_adv = _apgd(lambda images: predict(images + sigma * torch.randn_like(images)), x, y, norm, eps, draws=3)[0]
    broken = int(fooled(model, x, y, x_adv, norm, eps)[0].sum())
    if broken <= max(1, share * len(x)):
        return None
    return Flag(
        "gradient_masking",
        f"adversarial examples of a smoothed copy fool the model on {broken} of {len(x)} images on which every "
        "white-box attack failed: the gradients are shattered, try an adaptive attack",
    )


def _apgd(
    predict: Predict, x: Tensor, y: Tensor, norm: str, eps: float, *, steps: int = 20, draws: int = 1
) -> tuple[Tensor, ...]:
    """Run APGD on cross-entropy; return points of highest loss, ..., and the last points that fooled the model."""
    kind, _ = apgd.attack_classes()
    attack = kind(predict, n_iter=steps, norm=norm, eps=eps, eot_iter=draws, device=x.device, logger=Warnings())
    attack.init_hyperparam(x)
    return tuple(points.detach() for points in attack.attack_single_run(x, y))
