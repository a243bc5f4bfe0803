"""The settings of experiments that train models by themselves."""

# ruff: noqa: RUF009  (a call of option makes a field)

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from at_extensions.configuration import Settings, option
from at_extensions.settings.training import TrainSettings

_TRAINING = {f.name: f for f in fields(TrainSettings)}


def as_in_training(name: str, default: Any = MISSING) -> Any:
    """Return an option of ``train``, with another default if one is given."""
    return field(default=_TRAINING[name].default if default is MISSING else default, metadata=_TRAINING[name].metadata)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Demonstration."""

    out: str = option("runs/demo", "Folder for the two runs and the report.")
    epochs: int = option(60, "Passes over the training data of each run.", at_least=1)
    seed: int = option(0, "Seed of initial weights, order, augmentation and attacks.", at_least=0)
    progress: bool = option(True, "Show progress: bars on a terminal, else lines.")


@dataclass(frozen=True, kw_only=True)
class RandomLabelsSettings(Settings):
    """Random labels."""

    out: str = option("runs/random-labels", "Folder for results, figures and runs.")
    methods: list[str] = option(("pgd", "trades", "standard"), "Training methods, names of list_methods().")
    rates: list[float] = option((0.0, 0.5, 1.0), "Shares of training labels drawn anew at random.")
    label_noise_kind: str = as_in_training("label_noise_kind")
    seeds: list[int] = option((0, 1, 2), "Seeds: one run for each method, rate and seed.")
    data: str = as_in_training("data")
    root: str | None = as_in_training("root")
    image_size: int | None = as_in_training("image_size")
    train_size: int | None = as_in_training("train_size", 1000)
    val_fraction: float = as_in_training("val_fraction", 0.0)
    data_seed: int = as_in_training("data_seed")
    model: str = as_in_training("model")
    model_options: dict | None = as_in_training("model_options")
    eps: float = as_in_training("eps")
    alpha: float | None = option(
        None, "Step size of the training attacks; 1.5 eps / steps and at least eps / 4 by default.", above=0
    )
    steps: int = option(3, "Steps of the training attacks.", at_least=1)
    epochs: int = as_in_training("epochs")
    batch_size: int = as_in_training("batch_size", 64)
    optimizer: str = as_in_training("optimizer")
    lr: float = as_in_training("lr")
    momentum: float = as_in_training("momentum")
    weight_decay: float = as_in_training("weight_decay", 0.0)
    schedule: str = as_in_training("schedule", "step")
    milestones: list[int] | None = as_in_training("milestones")
    augment: str = as_in_training("augment", "none")
    precision: str = as_in_training("precision")
    pgd_steps: int = option(10, "Steps of the PGD that the runs are measured with, each of eps / 4.", at_least=1)
    n_test: int = option(
        1000, "Test images to measure on at most, as evenly over the classes as they allow.", at_least=1
    )
    n_instability: int = option(
        128, "Training images behind the gradient instability, at most; 0 leaves it out.", at_least=0
    )
    threads: int | None = option(None, "CPU threads of this process; unchanged by default.", at_least=1)
    progress: bool = as_in_training("progress")
