"""The metrics of a run, one dict an epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

from at_extensions.training.metrics import numbers


@dataclass
class History:
    """Metrics of a run, one dict an epoch.

    Attributes:
        rows: ``epoch`` (from 1), ``lr``, ``train_loss``, ``train_accuracy`` (on the images trained on), ``seconds``, a
            ``train_<name>`` for each term of the loss that the method names, and where there is a validation split
            ``val_clean_accuracy`` and ``val_robust_accuracy``. With class counts ``per_class`` and ``groups`` (head,
            medium, tail): dicts of accuracies by ``train``, ``val_clean``, ``val_robust``. Observers add entries of
            their own, and ``events`` where they stopped the run or rolled it back.
        best_epoch: The epoch whose weights are ``best``; None without validation.
        stopped: Why an observer ended the run; None where none did.
    """

    rows: list[dict] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str | None = None

    def to_dict(self) -> dict:
        """Return plain data."""
        return {"rows": self.rows, "best_epoch": self.best_epoch, "stopped": self.stopped}

    def __repr__(self) -> str:
        keys = list(dict.fromkeys(key for row in self.rows for key in numbers(row)))
        lines = [" ".join(f"{key:>19}" for key in keys)]
        for row in self.rows:
            cells = (f"{row[k]:>19.4g}" if isinstance(row.get(k), float) else f"{row.get(k, ''):>19}" for k in keys)
            lines.append(" ".join(cells) + (" best" if row.get("epoch") == self.best_epoch else ""))
        return "\n".join(lines)
