"""Sweeps of the learning rate or the batch size: each run's diffusion against how robust it became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from at_extensions.analysis.diffusion import diffusion
from at_extensions.optim import DEAT

_ENOUGH = 3  # different ratios, for a rank correlation to say anything


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep.

    Attributes:
        run: Its name.
        series: Its optimiser, such as ``"sgd, momentum 0.9"``; runs of one series differ in their ratio.
        ratio: Nominal lr / batch size, the measure of Sun et al. (2023).
        effective_ratio: Effective lr (``analysis.diffusion.effective_lr``) / batch size: the ratio where optimisers
            are compared.
        robust: Robust accuracy on data that was held out.
        robust_train: Accuracy on the training data as the method attacked it, where it was measured.
    """

    run: str
    series: str
    ratio: float
    effective_ratio: float
    robust: float
    robust_train: float | None = None


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of ratio and robust accuracy, in one series or in all runs together.

    Attributes:
        series: The optimiser, or ``"all runs"``.
        runs: How many runs.
        nominal: With the nominal ratio; None where that or the accuracy has one value only.
        effective: With the effective ratio.
    """

    series: str
    runs: int
    nominal: float | None
    effective: float | None


def sweep_point(
    run: str, training: Mapping[str, Any], robust: float, robust_train: float | None = None
) -> SweepPoint | None:
    """Place a run in a sweep by the ``training`` group of its config; None for an optimiser without such a ratio.

    Args:
        run: Its name.
        training: ``optimizer`` (sgd or deat), ``lr``, ``batch_size``, ``momentum`` and ``optimizer_options``.
        robust: Robust accuracy on held-out data.
        robust_train: On training data.
    """
    name, momentum = training.get("optimizer"), training.get("momentum", 0.0)
    if name not in ("sgd", "deat") or not all(training.get(key) for key in ("lr", "batch_size")):
        return None
    weights, options = nn.Linear(1, 1).parameters(), training.get("optimizer_options") or {}
    if name == "deat":
        optimizer: torch.optim.Optimizer = DEAT(weights, lr=training["lr"], **options)
    else:
        optimizer = torch.optim.SGD(weights, lr=training["lr"], momentum=momentum, **options)
        name = f"sgd, momentum {momentum:g}" if momentum else "plain sgd"
    name += "".join(f", {key} {value}" for key, value in options.items())
    found = diffusion(optimizer, training["batch_size"])
    effective = found.effective_lr / training["batch_size"]
    return SweepPoint(run, name, found.lr_batch_ratio, effective, robust, robust_train)


def is_sweep(points: Sequence[SweepPoint]) -> bool:
    """Return whether some series has enough different ratios for a rank correlation."""
    return any(len({p.ratio for p in of_one}) >= _ENOUGH for of_one in by_series(points).values())


def by_series(points: Sequence[SweepPoint]) -> dict[str, list[SweepPoint]]:
    """Return the points of each series, in order of their ratio."""
    series: dict[str, list[SweepPoint]] = {}
    for point in sorted(points, key=lambda p: p.ratio):
        series.setdefault(point.series, []).append(point)
    return series


def rank_correlations(points: Sequence[SweepPoint]) -> list[RankCorrelation]:
    """Return Spearman's rank correlation of each series with enough ratios, and of all runs if there are several."""
    series = by_series(points)
    groups = {name: group for name, group in series.items() if len({p.ratio for p in group}) >= _ENOUGH}
    if len(series) > 1 and groups:
        groups["all runs"] = list(points)
    return [
        RankCorrelation(
            name,
            len(group),
            _spearman([p.ratio for p in group], [p.robust for p in group]),
            _spearman([p.effective_ratio for p in group], [p.robust for p in group]),
        )
        for name, group in groups.items()
    ]


def _spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    from scipy.stats import spearmanr

    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    return float(spearmanr(xs, ys).statistic)
