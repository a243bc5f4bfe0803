"""The one training loop, and the optimisers and schedules it is usually given."""

from at_extensions.presets import list_presets, preset
from at_extensions.training.history import History
from at_extensions.training.observers import CollapseGuard, EarlyStopping, Observer, OverfittingProbe, RollBack, Stop
from at_extensions.training.schedule import OPTIMIZERS, SCHEDULES, create_optimizer, create_scheduler
from at_extensions.training.trainer import Trainer

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "CollapseGuard",
    "EarlyStopping",
    "History",
    "Observer",
    "OverfittingProbe",
    "RollBack",
    "Stop",
    "Trainer",
    "create_optimizer",
    "create_scheduler",
    "list_presets",
    "preset",
]
