"""Observers of a training run: they see every epoch, may add to its metrics, stop the run or roll it back."""

from at_extensions.training.observers.collapse_guard import CollapseGuard
from at_extensions.training.observers.collapse_verdict import Verdict
from at_extensions.training.observers.early_stopping import EarlyStopping
from at_extensions.training.observers.observer import Observer, RollBack, Stop, Training
from at_extensions.training.observers.overfitting_probe import OverfittingProbe

__all__ = [
    "CollapseGuard",
    "EarlyStopping",
    "Observer",
    "OverfittingProbe",
    "RollBack",
    "Stop",
    "Training",
    "Verdict",
]
