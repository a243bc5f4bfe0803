"""Verification of adversarial examples: the model as given is fooled, within the ball and the box."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ORDER = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}
ULP = torch.finfo(torch.float32).eps


def fooled(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, x_adv: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Return which of ``x_adv`` fool the model within the eps-ball and the box (B,), and the predicted classes (B,).

    Args:
        model: The model as the user gave it.
        x: Images (B, C, H, W).
        y: Their classes (B,).
        x_adv: Candidates (B, C, H, W).
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        eps: Radius of the ball.
    """
    predictions = model(x_adv).argmax(1)
    return (predictions != y) & within(x, x_adv, norm, eps), predictions


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the own class's logit minus the largest other (B,), from logits (B, K) and classes (B,)."""
    own = y.unsqueeze(1)
    return logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -torch.inf).amax(1)


def within(x: Tensor, x_adv: Tensor, norm: str, eps: float) -> Tensor:
    """Return which of ``x_adv`` lie in the eps-ball around ``x`` and in [0, 1], up to float32 rounding (B,).

    The slack is one unit in the last place for every pixel, ||ulp||_p = ulp n^(1/p), and 1e-5 of the radius.
    """
    distance = torch.linalg.vector_norm((x_adv - x).flatten(1), ord=ORDER[norm], dim=1)
    slack = 1e-5 * eps + ULP * x[0].numel() ** (1 / ORDER[norm])
    pixels = x_adv.flatten(1)
    return (distance <= eps + slack) & (pixels.amin(1) >= -ULP) & (pixels.amax(1) <= 1 + ULP)
