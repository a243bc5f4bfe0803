"""Early stopping: the run ends when a metric no longer improves."""

from __future__ import annotations

from typing import Any

from torch import nn

from at_extensions.checks import check_count, check_name, check_number
from at_extensions.training.observers.observer import Observer, Stop


class EarlyStopping(Observer):
    """Ends a run when a metric has not improved for some epochs.

    Robust overfitting (Rice et al. 2020, arXiv 2002.11569): robust accuracy on held-out images peaks early and falls
    while training goes on; the best epoch's weights are kept either way, and this saves the epochs after them.

    Args:
        metric: A number in the epoch's row.
        patience: Epochs without improvement after which the run ends, at least 1.
        min_delta: Smallest change that counts as an improvement, at least 0.
        mode: ``"max"`` for accuracies, ``"min"`` for losses.

    Raises:
        ValueError: A number out of range or an unknown mode; in training, a row without the metric.
    """

    def __init__(
        self,
        metric: str = "val_robust_accuracy",
        patience: int = 10,
        *,
        min_delta: float = 0.0,
        mode: str = "max",
    ):
        self.metric = metric
        self.patience = check_count("patience", patience)
        self.min_delta = check_number("min_delta", min_delta, at_least=0)
        self.mode = check_name("mode", mode, ("max", "min"))
        self.best: float | None = None
        self.best_epoch = 0

    def after_epoch(self, epoch: int, model: nn.Module, row: dict[str, Any]) -> Stop | None:
        """Compare the metric with its best value so far."""
        value = row.get(self.metric)
        if not isinstance(value, (int, float)):
            numbers = ", ".join(key for key, v in row.items() if isinstance(v, (int, float)))
            raise ValueError(f"EarlyStopping watches {self.metric!r}, which the epoch's row has not; it has {numbers}")
        sign = 1 if self.mode == "max" else -1
        if self.best is None or sign * (value - self.best) > self.min_delta:
            self.best, self.best_epoch = float(value), epoch
        if epoch - self.best_epoch < self.patience:
            return None
        return Stop(
            f"{self.metric} has not improved on {self.best:.4g} (epoch {self.best_epoch}) for {self.patience} epochs",
            {"metric": self.metric, "best": self.best, "best_epoch": self.best_epoch, "value": float(value)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its epoch."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with another one's best value."""
        self.best, self.best_epoch = state["best"], state["best_epoch"]
