"""Robust overfitting read off a run's metrics, and label agreement of an ensemble's predictions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from at_extensions.checks import check_count, check_number
from at_extensions.intervals import paired_bootstrap

KEY = "val_robust_accuracy"
"""The metric of a run that robust overfitting is read off."""


@dataclasses.dataclass(frozen=True, repr=False)
class RobustOverfitting:
    """Robust overfitting of a run; accuracies are fractions, epochs count from 1.

    Attributes:
        onset: First epoch from which the smoothed robust accuracy stays below its best by more than ``margin``; None
            where it never does.
        best_epoch: Epoch of the best robust accuracy.
        best: That accuracy. A maximum over noisy epochs, so it is biased upward a little.
        last: Robust accuracy of the last epoch.
        gap: ``best - last``.
        interval: 95 % interval of the gap: paired bootstrap where verdicts are given, from the binomial standard errors
            where only the number of images is; else None.
        margin: The drop that counts.
        train_rise: Rise of the robust training accuracy from the best epoch to the last; None where it is not in the
            history.
        advice: A recommendation in a sentence.
    """

    onset: int | None
    best_epoch: int
    best: float
    last: float
    gap: float
    interval: tuple[float, float] | None
    margin: float
    train_rise: float | None
    advice: str

    @property
    def overfits(self) -> bool:
        """Whether the run overfits: there is an onset, and robust training accuracy did not fall with it."""
        return self.onset is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it."""
        return dataclasses.asdict(self) | {"overfits": self.overfits}

    def __repr__(self) -> str:
        interval = "" if self.interval is None else f"   [{100 * self.interval[0]:.2f}, {100 * self.interval[1]:.2f}]"
        return "\n".join(
            [
                f"RobustOverfitting: {'from epoch ' + str(self.onset) if self.overfits else 'none'}",
                f"  best      {100 * self.best:6.2f} % in epoch {self.best_epoch}",
                f"  last      {100 * self.last:6.2f} %",
                f"  gap       {100 * self.gap:6.2f} points{interval}",
                f"  {self.advice}",
            ]
        )


FEWEST_EPOCHS = 4
"""Epochs below which a run says nothing about overfitting."""


def robust_overfitting(
    history: Any,
    *,
    key: str = KEY,
    margin: float | None = None,
    n_images: int | None = None,
    verdicts: tuple[Tensor, Tensor] | None = None,
    smoothing: int = 3,
    seed: int = 0,
) -> RobustOverfitting:
    """Find out whether and since when a run overfits robustly (Rice et al. 2020, arXiv 2002.11569).

    Robust overfitting: robust accuracy on held-out images falls while it rises on the training images. The onset is the
    first epoch from which the running mean of ``smoothing`` epochs stays more than ``margin`` below its best until the
    end, with a robust training accuracy that did not fall. An accuracy that falls on both, as in a collapse, is none.

    Args:
        history: A ``Trainer``'s history, its rows, or ``RunDirectory.metrics()``: one mapping an epoch.
        key: The metric, robust accuracy on held-out images in [0, 1].
        margin: The drop that counts; None takes two standard errors of a difference where ``n_images`` is known, but at
            least 0.01.
        n_images: Number of held-out images behind the metric.
        verdicts: Which of the same images the best and the last weights are robust on, two boolean tensors (N,), such
            as ``RobustnessReport.robust``: the interval is then a paired bootstrap's, and ``gap`` theirs.
        smoothing: Epochs of the running mean.
        seed: Of the bootstrap.

    Raises:
        ValueError: No epoch with that metric, a number out of range, or verdicts of different images.
    """
    rows = _rows(history, key)
    check_count("smoothing", smoothing)
    epochs, values = [int(row["epoch"]) for row in rows], [float(row[key]) for row in rows]
    best_at = max(range(len(values)), key=values.__getitem__)
    best, last = values[best_at], values[-1]
    if margin is None:
        margin = max(0.01, 2 * _standard_error(best, last, n_images)) if n_images else 0.01
    check_number("margin", margin, at_least=0)
    train = [row.get("train_accuracy") for row in rows]
    rise = None if None in (train[best_at], train[-1]) else train[-1] - train[best_at]
    onset = _onset(_running_mean(values, smoothing), margin) if rise is None or rise >= 0 else None
    gap, interval = best - last, None
    if verdicts is not None:
        difference = paired_bootstrap(*verdicts, seed=seed)
        gap, interval = difference.mean, difference.interval
    elif n_images:
        half = 1.959964 * _standard_error(best, last, check_count("n_images", n_images))
        interval = (gap - half, gap + half)
    return RobustOverfitting(
        onset=None if onset is None else epochs[onset],
        best_epoch=epochs[best_at],
        best=best,
        last=last,
        gap=gap,
        interval=interval,
        margin=margin,
        train_rise=rise,
        advice=_advice(None if onset is None else epochs[onset], epochs[best_at], gap, rise, interval),
    )


@dataclasses.dataclass(frozen=True, repr=False)
class LabelAgreement:
    """How far an ensemble's predictions agree with the labels of its training set.

    Attributes:
        agreement: Probability of the given label, for each sample (N,); NaN for samples never visited.
        suspicion: 1 - agreement (N,): the larger, the more likely the label is wrong.
        disagrees: Whether another class is the most probable one (N,).
        auroc: Area under the ROC curve of ``suspicion`` against the labels known to be wrong; None where they are not
            known, or none or all are wrong.
    """

    agreement: Tensor
    suspicion: Tensor
    disagrees: Tensor
    auroc: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it."""
        return {
            "agreement": self.agreement.tolist(),
            "disagrees": self.disagrees.tolist(),
            "auroc": self.auroc,
        }

    def __repr__(self) -> str:
        visited = ~self.agreement.isnan()
        share = self.disagrees[visited].double().mean().item() if visited.any() else math.nan
        detected = "" if self.auroc is None else f", AUROC of wrong labels {self.auroc:.3f}"
        return f"LabelAgreement: {int(visited.sum())} samples, {100 * share:.1f} % disagree with their label{detected}"


def label_agreement(table: Tensor, labels: Tensor, clean_labels: Tensor | None = None) -> LabelAgreement:
    """Compare an ensemble's averaged predictions with the labels it was trained on, as a detector of wrong labels.

    Args:
        table: Averaged probabilities (N, K), such as ``TemporalEnsembling.predictions()``; rows are normalised, and a
            row of zeros is a sample that was never visited.
        labels: Labels trained on (N,).
        clean_labels: The true labels (N,), where noise was planted: gives the AUROC.

    Raises:
        ValueError: Shapes that do not match, negative entries, or labels out of range.
    """
    if table.ndim != 2 or labels.shape != table.shape[:1]:
        raise ValueError(f"table must be (N, K) with labels (N,), got {tuple(table.shape)} and {tuple(labels.shape)}")
    if clean_labels is not None and clean_labels.shape != labels.shape:
        raise ValueError(f"clean_labels must have shape {tuple(labels.shape)}, got {tuple(clean_labels.shape)}")
    table, labels = table.double().cpu(), labels.long().cpu()
    if bool((table < 0).any()):
        raise ValueError("table holds negative entries; it must hold probabilities")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < table.shape[1]:
        raise ValueError(f"labels must lie in [0, {table.shape[1]}) for a table of {table.shape[1]} classes")
    total = table.sum(1)
    agreement = table.gather(1, labels.unsqueeze(1)).squeeze(1) / total  # 0 / 0, never visited, is NaN
    disagrees = (table.argmax(1) != labels) & (total > 0)
    auroc = None
    if clean_labels is not None:
        visited = total > 0
        wrong = (clean_labels.long().cpu() != labels)[visited]
        if 0 < int(wrong.sum()) < len(wrong):
            from sklearn.metrics import roc_auc_score

            auroc = float(roc_auc_score(wrong.numpy(), 1 - agreement[visited].numpy()))
    return LabelAgreement(agreement, 1 - agreement, disagrees, auroc)


def _rows(history: Any, key: str) -> list[Mapping[str, Any]]:
    rows = getattr(history, "rows", history)
    if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError("history must be a Trainer's history or its rows, one mapping an epoch")
    found = [row for row in rows if isinstance(row.get(key), (int, float))]
    if not found:
        raise ValueError(f"no epoch has {key!r}; train with a validation split and an attack (val_fraction > 0)")
    return found


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return centred running means; at the ends, of the epochs there are."""
    before, after = (window - 1) // 2, window // 2
    cuts = [values[max(0, i - before) : i + after + 1] for i in range(len(values))]
    return [math.fsum(cut) / len(cut) for cut in cuts]


def _onset(smooth: Sequence[float], margin: float) -> int | None:
    """Return the first index after the best from which every value is below the best by more than ``margin``."""
    best_at = max(range(len(smooth)), key=smooth.__getitem__)
    onset = None
    for i in range(len(smooth) - 1, best_at, -1):
        if not smooth[i] < smooth[best_at] - margin:
            break
        onset = i
    return onset


def _standard_error(a: float, b: float, n: int) -> float:
    """Return the standard error of a difference of two proportions of ``n`` images, taken as independent."""
    return math.sqrt((a * (1 - a) + b * (1 - b)) / n)


def _advice(
    onset: int | None, best_epoch: int, gap: float, rise: float | None, interval: tuple[float, float] | None
) -> str:
    if rise is not None and rise < 0 and gap > 0.02:
        return (
            f"Robust accuracy fell on the training images too ({100 * rise:.1f} points): not robust overfitting; "
            "look for catastrophic overfitting or a learning rate that is too high."
        )
    if onset is None:
        return "No robust overfitting: the last epoch is as good as the best, so train longer if accuracy still rises."
    unsure = interval is not None and interval[0] <= 0
    hedge = " (the interval of the gap includes 0)" if unsure else ""
    return (
        f"Robust overfitting since epoch {onset}{hedge}: use the weights of epoch {best_epoch} or stop there, average "
        "the weights (ema=0.995), or regularise with temporal ensembling or AWP."
    )
