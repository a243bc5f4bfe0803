"""Catastrophic overfitting read off a run's metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from at_extensions.analysis.overfitting import KEY
from at_extensions.checks import check_number

_SUDDEN = 0.75  # of the best of the two epochs before: robust overfitting does not fall below it so fast
_LEAST_FALL = 0.05  # accuracy that noise does not explain
_LOST = 0.9  # of the training accuracy at the best epoch: below it training itself has failed


@dataclasses.dataclass(frozen=True, repr=False)
class CatastrophicOverfitting:
    """Catastrophic overfitting of a run; accuracies are fractions, epochs count from 1.

    Attributes:
        onset: Epoch at whose end the model was first seen collapsed; None without a collapse.
        sign: ``"fall"`` (robust accuracy below a share of its best) or ``"gap"`` (training accuracy under attack far
            above robust accuracy, which fell suddenly); None without a collapse.
        robust_before: Best robust accuracy before the onset; without one, of the run.
        robust_at_onset: Robust accuracy at the onset.
        train_at_onset: Training accuracy under attack at the onset, where it is known.
        last: Robust accuracy of the last epoch.
        recovered: Whether the last epoch is no longer collapsed; None without a collapse.
        events: A guard's events, which the run's rows hold (``training.observers.CollapseGuard``).
        advice: A recommendation in a sentence.
    """

    onset: int | None
    sign: str | None
    robust_before: float
    robust_at_onset: float | None
    train_at_onset: float | None
    last: float
    recovered: bool | None
    events: list[dict[str, Any]]
    advice: str

    @property
    def collapsed(self) -> bool:
        """Whether the run was seen collapsed at an epoch's end."""
        return self.onset is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it."""
        return dataclasses.asdict(self) | {"collapsed": self.collapsed}

    def __repr__(self) -> str:
        lines = [f"CatastrophicOverfitting: {'in epoch ' + str(self.onset) if self.collapsed else 'none'}"]
        lines.append(f"  best      {100 * self.robust_before:6.2f} %{' before' if self.collapsed else ''}")
        if self.collapsed:
            train = "" if self.train_at_onset is None else f", training {100 * self.train_at_onset:.2f} %"
            lines.append(f"  onset     {100 * self.robust_at_onset:6.2f} %{train}   (sign: {self.sign})")
        lines.append(f"  last      {100 * self.last:6.2f} %")
        lines += [f"  event     epoch {event.get('epoch')}: {event.get('event')}" for event in self.events]
        return "\n".join([*lines, f"  {self.advice}"])


def catastrophic_overfitting(
    history: Any, *, key: str = KEY, gap: float = 0.3, fall: float = 0.5
) -> CatastrophicOverfitting:
    """Find out whether and in which epoch a single-step training collapsed (Wong et al. 2020, arXiv 2001.03994).

    An epoch is collapsed if training accuracy under attack has not fallen with robust accuracy, and

    - robust accuracy is below ``fall`` times its best so far, by 5 points or more; or
    - training accuracy under attack exceeds it by more than ``gap``, has risen since the epoch before, and robust
      accuracy fell to less than three quarters of the better of the two epochs before.

    Robust overfitting (``robust_overfitting``) is another thing: robust accuracy falls slowly, by a tenth or so of
    itself over many epochs. A training that fails altogether loses its training accuracy too, and is neither.

    Args:
        history: A ``Trainer``'s history, its rows, or ``RunDirectory.metrics()``: one mapping an epoch.
        key: The metric, accuracy under PGD on held-out images in [0, 1].
        gap: Difference of accuracies that counts, in (0, 1).
        fall: Share of the best robust accuracy below which it has collapsed, in (0, 1).

    Raises:
        ValueError: No epoch with that metric, or a number out of range.
    """
    check_number("gap", gap, above=0, below=1)
    check_number("fall", fall, above=0, below=1)
    every = getattr(history, "rows", history)
    if not isinstance(every, Sequence) or not all(isinstance(row, Mapping) for row in every):
        raise ValueError("history must be a Trainer's history or its rows, one mapping an epoch")
    rows = [row for row in every if isinstance(row.get(key), (int, float))]
    if not rows:
        raise ValueError(f"no epoch has {key!r}; train with a validation split and an attack (val_fraction > 0)")
    events = [e for row in every for e in row.get("events", []) if e.get("observer") == "CollapseGuard"]
    signs = [_sign(rows, i, key, gap, fall) for i in range(len(rows))]
    values = [float(row[key]) for row in rows]
    at = next((i for i, sign in enumerate(signs) if sign), None)
    recovered = None if at is None else not _still(values, at, fall)
    return CatastrophicOverfitting(
        onset=None if at is None else int(rows[at]["epoch"]),
        sign=None if at is None else signs[at],
        robust_before=max(values[:at]),
        robust_at_onset=None if at is None else values[at],
        train_at_onset=None if at is None else rows[at].get("train_accuracy"),
        last=values[-1],
        recovered=recovered,
        events=events,
        advice=_advice(None if at is None else int(rows[at]["epoch"]), recovered, events),
    )


def _sign(rows: Sequence[Mapping[str, Any]], i: int, key: str, gap: float, fall: float) -> str | None:
    """Return the sign by which an epoch is collapsed, or None."""
    if i == 0:
        return None
    values = [float(row[key]) for row in rows[: i + 1]]
    train = [row.get("train_accuracy") for row in rows[: i + 1]]
    best_at = max(range(i), key=values.__getitem__)
    best, value = values[best_at], values[i]
    known = None not in (train[i], train[i - 1], train[best_at])
    if known and train[i] < _LOST * train[best_at]:
        return None
    if value < fall * best and best - value >= _LEAST_FALL:
        return "fall"
    sudden = value < _SUDDEN * max(values[max(0, i - 2) : i])
    if known and train[i] - value > gap and train[i] > train[i - 1] and sudden:
        return "gap"
    return None


def _still(values: Sequence[float], at: int, fall: float) -> bool:
    """Whether the last epoch lies nearer to the collapse than to the best before it."""
    best = max(values[:at])
    return values[-1] < max(fall, _SUDDEN) * best


def _advice(onset: int | None, recovered: bool | None, events: Sequence[Mapping[str, Any]]) -> str:
    rolled = [event for event in events if event.get("event") == "rollback"]
    if onset is None and rolled:
        remedies = ", ".join(dict.fromkeys(str(event.get("remedy")) for event in rolled))
        return f"The guard caught a collapse and rolled back ({remedies}); begin the next run with that remedy."
    if onset is None:
        return "No catastrophic overfitting at any epoch's end."
    then = " It recovered, as runs do for a while." if recovered else ""
    return (
        f"Catastrophic overfitting in epoch {onset}: use weights of before, and train with method n_fgsm or "
        f"grad_align, more attack steps or a smaller alpha; guard=rollback goes on after a collapse.{then}"
    )
