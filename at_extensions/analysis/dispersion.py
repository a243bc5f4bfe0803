"""Local dispersion: how far apart an attack ends when it starts from different random points."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.attacks import check_attack, perturb
from at_extensions.checks import check_count, check_images, check_labels, check_logits, check_model, device_of
from at_extensions.untouched import RandomStream, attacking, isolated

NORMS = (1, 2, math.inf)
"""Norms in which two end points can be compared."""

_WITHOUT_START = (torchattacks.FGSM, torchattacks.BIM, torchattacks.MIFGSM)


@dataclasses.dataclass(frozen=True, repr=False)
class Dispersion:
    """Local dispersion of an attack around samples, with its companions.

    Attributes:
        mean: Over samples, of ``per_sample``; in units of pixels in [0, 1].
        stderr: Standard error of ``mean`` over samples; NaN for a single one.
        per_sample: Mean distance between the end points of two independent starts (N,), an unbiased U-statistic over
            all pairs of starts.
        per_sample_stderr: Its jackknife standard error over starts (N,); NaN for two starts.
        angle: 1 - mean cosine between the perturbations of two starts, over pairs where both are not zero; NaN where
            there is no such pair.
        shift: Mean Euclidean length of the perturbation averaged over starts.
        saturated: Share of perturbed values at the ball's faces, ``|delta| = eps``; None for an attack without ``eps``.
        success: Share of end points that the model misclassifies.
        relative: ``mean`` as a share of the ball's diameter, ``2 eps d^(1/norm)``, in [0, 1]; None without ``eps``.
        norm: 1, 2 or inf.
        starts: Random starts a sample.
    """

    mean: float
    stderr: float
    per_sample: Tensor
    per_sample_stderr: Tensor
    angle: float
    shift: float
    saturated: float | None
    success: float
    relative: float | None
    norm: float
    starts: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            key: value.tolist() if isinstance(value, Tensor) else "inf" if value == math.inf else value
            for key, value in values.items()
        }

    def __repr__(self) -> str:
        share = "" if self.relative is None else f"   {100 * self.relative:.3g} % of the ball's diameter"
        rows = [
            f"Dispersion: {len(self.per_sample)} samples, {self.starts} starts, L{self.norm:g}",
            f"  mean       {self.mean:10.4g} +- {self.stderr:.2g}{share}",
            f"  angle      {self.angle:10.4g}",
            f"  shift      {self.shift:10.4g}",
            f"  success    {self.success:10.4g}",
        ]
        return "\n".join(rows if self.saturated is None else [*rows, f"  saturated  {self.saturated:10.4g}"])


def local_dispersion(
    model: nn.Module,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    *,
    starts: int = 10,
    norm: float = 2,
    seed: int = 0,
    batch_size: int = 128,
) -> Dispersion:
    """Measure how far an attack's end points spread over its random starts.

    The expected local dispersion of Tian & Mao (arXiv 2311.16526) around a sample (x, y),

        gamma(x, y) = E || Q(x + rho) - Q(x + rho') ||,    rho, rho' independent random starts,

    where Q is the attack, projected around x. Their text names no norm: the default of 2 is a *reconstruction*. The
    attack runs once from each of ``starts`` points; all pairs of end points give an unbiased estimate (45 pairs for the
    price of 10 attacks).

    On a locally linear loss with ``steps * alpha >= 2 eps``, Linf PGD ends in the same corner from everywhere and the
    dispersion is exactly 0, so that what is left measures curvature. With smaller ``steps * alpha`` a part of the
    dispersion only says that the attack was too short: a warning says so.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K); attacked in eval mode and left as it was.
        attack: A torchattacks attack on that model, with a random start.
        x: Images (N, C, H, W) in [0, 1].
        y: Class numbers (N,).
        starts: Random starts a sample, at least 2.
        norm: 1, 2 or ``math.inf``.
        seed: Of the random starts; the same call gives the same numbers.
        batch_size: Samples attacked at a time; ``starts`` perturbed copies of them are in memory.

    Raises:
        TypeError: Not a model, an attack, images or labels.
        ValueError: Images or labels out of range, fewer than two starts, another norm, an attack on another model.

    Warns:
        UserWarning: The attack has no random start, or ``steps * alpha < 2 eps``.
    """
    device = device_of(check_model(model))
    check_attack(attack, model)
    check_images(x)
    check_labels(y, size=len(x))
    starts = check_count("starts", starts, at_least=2)
    check_count("batch_size", batch_size)
    if norm not in NORMS:
        raise ValueError(f"norm must be 1, 2 or math.inf, got {norm!r}")
    _warn_about(attack)
    eps = getattr(attack, "eps", None)
    stream, parts = RandomStream(seed), []
    with isolated(device), attacking(model):
        for images, labels in zip(x.split(batch_size), y.split(batch_size)):
            images, labels = images.to(device), labels.to(device)
            ends = torch.stack([perturb(attack, images, labels, stream=stream) for _ in range(starts)], 1)
            with torch.no_grad():
                parts.append(_of_batch(model, images, labels, ends, norm, eps))
    return _summary(parts, x[0].numel(), eps, norm, starts)


def _of_batch(
    model: nn.Module, x: Tensor, y: Tensor, ends: Tensor, norm: float, eps: float | None
) -> dict[str, Tensor]:
    """Return the statistics of each sample, of its end points (B, m, C, H, W), on the CPU in float64."""
    starts = ends.shape[1]
    wrong = torch.stack([check_logits(model(end), len(x)).argmax(1) != y for end in ends.unbind(1)], 1)
    flat = ends.flatten(2).double()
    moves = flat - x.flatten(1).double().unsqueeze(1)
    distances = torch.cdist(flat, flat, p=norm, compute_mode="donot_use_mm_for_euclid_dist")  # (B, m, m)
    to_others = distances.sum(2)
    total = to_others.sum(1)
    mean = total / (starts * (starts - 1))
    if starts > 2:
        without = (total.unsqueeze(1) - 2 * to_others) / ((starts - 1) * (starts - 2))
        spread = (without - without.mean(1, keepdim=True)).square().sum(1)
        stderr = (spread * (starts - 1) / starts).sqrt()
    else:
        stderr = torch.full_like(mean, math.nan)
    lengths = moves.norm(dim=2)
    unit = moves / lengths.unsqueeze(2).clamp_min(1e-300)
    moved = (lengths > 0).double()
    cosines = unit.sum(1).square().sum(1) - moved.sum(1)  # over ordered pairs of two different starts
    pairs = moved.sum(1) * (moved.sum(1) - 1)
    found = {
        "per_sample": mean,
        "stderr": stderr,
        "cosines": cosines,
        "pairs": pairs,
        "shift": moves.mean(1).norm(dim=1),
        "success": wrong.double().mean(1),
    }
    if eps is not None:
        found["saturated"] = (moves.abs() >= eps * (1 - 1e-5)).double().mean((1, 2))
    return {name: value.cpu() for name, value in found.items()}


def _summary(parts: Sequence[dict[str, Tensor]], numel: int, eps: float | None, norm: float, starts: int) -> Dispersion:
    of = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    mean, count, pairs = of["per_sample"].mean().item(), len(of["per_sample"]), of["pairs"].sum().item()
    diameter = None if eps is None else 2 * eps * (1 if norm == math.inf else numel ** (1 / norm))
    return Dispersion(
        mean=mean,
        stderr=of["per_sample"].std().item() / math.sqrt(count) if count > 1 else math.nan,
        per_sample=of["per_sample"],
        per_sample_stderr=of["stderr"],
        angle=1 - of["cosines"].sum().item() / pairs if pairs else math.nan,
        shift=of["shift"].mean().item(),
        saturated=of["saturated"].mean().item() if "saturated" in of else None,
        success=of["success"].mean().item(),
        relative=None if not diameter else mean / diameter,
        norm=float(norm),
        starts=starts,
    )


def _warn_about(attack: Attack) -> None:
    """Warn where the dispersion is 0 by construction, or where a part of it only shows a short attack."""
    fixed = getattr(attack, "random_start", None) is False or getattr(attack, "start", None) == "zero"
    if fixed or type(attack) in _WITHOUT_START:
        warnings.warn(f"{attack.attack} has no random start, so its dispersion is 0 by construction", stacklevel=3)
        return
    eps, alpha, steps = (getattr(attack, name, None) for name in ("eps", "alpha", "steps"))
    if None not in (eps, alpha, steps) and steps * alpha < 2 * eps * (1 - 1e-9):
        warnings.warn(
            f"{attack.attack} takes {steps} steps of {alpha:.4g}, less than the ball's diameter {2 * eps:.4g}: a part "
            "of its dispersion is left over from the start, on a linear loss too",
            stacklevel=3,
        )
