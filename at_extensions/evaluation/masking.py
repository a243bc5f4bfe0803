"""Does the gradient lead anywhere? Two short attacks that tell masked gradients from robustness."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from at_extensions.evaluation.attacks import apgd
from at_extensions.evaluation.flags import Flag, Warnings
from at_extensions.evaluation.verification import ORDER, fooled

Predict = Callable[[Tensor], Tensor]

SAMPLES = 64
"""How many images the checks need at most."""


def unbounded(
    model: Predict, x: Tensor, y: Tensor, norm: str, *, left: float = 0.1, search: Predict | None = None
) -> Flag | None:
    """Return a flag if a gradient attack fails although it may turn every image into any other.

    With a radius of half the box in every pixel, where grey is within reach of every image, nothing is robust; what
    still stands is out of the gradient's reach (Carlini et al. 2019, arXiv 1902.06705, section 5).

    Args:
        model: The model as given.
        x: Images that it classifies rightly (B, C, H, W).
        y: Their classes (B,).
        norm: Threat model.
        left: Share of them that may stand.
        search: What to follow the gradients of; the model itself if None.
    """
    if len(x) == 0:
        return None
    eps = 0.5 * x[0].numel() ** (1 / ORDER[norm])
    x_adv = _apgd(model if search is None else search, x, y, norm, eps)[3]
    stands = int((model(x_adv).argmax(1) == y).sum())
    if stands <= max(1, left * len(x)):
        return None
    return Flag(
        "gradient_masking",
        f"APGD without a bound leaves {stands} of {len(x)} images right: the gradients do not lead to the model's "
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
    """Return a flag if adversarial examples of a smoothed surrogate break what white-box attacks left standing.

    The surrogate is the model under Gaussian noise of half the ball's size, whose averaged gradient looks past ripples
    that shatter the model's own (as Tramer et al. 2020, arXiv 2002.08347, break k-WTA).

    Args:
        model: The model as given.
        x: Images that no attack broke (B, C, H, W).
        y: Their classes (B,).
        norm: Threat model.
        eps: Its radius.
        share: Share of them that may fall.
        search: What to make the surrogate of; the model itself if None.
    """
    if len(x) == 0:
        return None
    sigma = eps / (2 * x[0].numel() ** (1 / ORDER[norm]))
    predict = model if search is None else search
    x_adv = _apgd(lambda images: predict(images + sigma * torch.randn_like(images)), x, y, norm, eps, draws=3)[0]
    fallen = int(fooled(model, x, y, x_adv, norm, eps)[0].sum())
    if fallen <= max(1, share * len(x)):
        return None
    return Flag(
        "gradient_masking",
        f"adversarial examples of a smoothed copy break {fallen} of {len(x)} images that every white-box attack left "
        "standing: the gradients are shattered, try an adaptive attack",
    )


def _apgd(
    predict: Predict, x: Tensor, y: Tensor, norm: str, eps: float, *, steps: int = 20, draws: int = 1
) -> tuple[Tensor, ...]:
    """What a run of APGD on cross-entropy returns: points of highest loss, ..., and the last that fooled the model."""
    kind, _ = apgd.attack_classes()
    attack = kind(predict, n_iter=steps, norm=norm, eps=eps, eot_iter=draws, device=x.device, logger=Warnings())
    attack.init_hyperparam(x)
    return tuple(points.detach() for points in attack.attack_single_run(x, y))
