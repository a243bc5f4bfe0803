"""Observers of a training run: they see every epoch, may add to its metrics, stop the run or roll it back."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchattacks.attack import Attack

from at_extensions.analysis import Dispersion, local_dispersion
from at_extensions.attacks import PGD
from at_extensions.checks import check_count, check_images, check_name, check_number, device_of
from at_extensions.methods import Method, Step
from at_extensions.training.history import History
from at_extensions.untouched import attacking


class Training(Protocol):
    """A running training as observers and checkpoints see it: a ``Trainer``.

    Attributes:
        method: The training method, which a remedy may exchange.
        optimizer: The optimiser.
        scheduler: The schedule, or None.
        ema: timm's ModelEmaV3, or None.
        observers: The observers.
        history: The metrics so far.
        rollbacks: How often it was rolled back.
    """

    method: Method
    optimizer: Optimizer
    scheduler: LRScheduler | None
    ema: Any
    observers: list[Observer]
    history: History
    rollbacks: int


@dataclass
class Stop:
    """An observer's request to end the training.

    Asked for within an epoch, the epoch ends at that step; it is validated and saved as any other, then the run ends.

    Args:
        reason: A sentence for the log.
        evidence: Plain numbers and texts, kept in the row's ``events``.
    """

    reason: str
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass
class RollBack:
    """An observer's request to go back to an earlier state and to train on from there.

    Model, optimiser, schedule, method, averaged weights, random streams and the states of the other observers become
    the ones of the newest snapshot that is at least ``steps`` steps old, at the oldest those of the epoch's beginning.
    The same batches follow as followed then.

    Args:
        reason: A sentence for the log.
        steps: How many steps to go back at least; None goes back to the epoch's beginning.
        remedy: Called with the trainer after the restoration, to change the cause: the attack
            (``trainer.method.attack = ...``), the method (``trainer.method = GradAlign(trainer.method)``), a learning
            rate. A resumed run does not call it: the observer notes it in its ``state_dict``, and its
            ``load_state_dict`` repeats it unless this trainer's method has it already.
        evidence: Plain numbers and texts, kept in the row's ``events``.
    """

    reason: str
    steps: int | None = None
    remedy: Callable[[Training], None] | None = None
    evidence: dict[str, Any] = field(default_factory=dict)


class Observer:
    """Sees a training run; a subclass overrides some of these methods.

    Every process calls the same observers at the same moments. Requests must be the same in all processes, so they are
    to depend on ``row`` or on values reduced by ``processes.add_over_ranks``; the trainer refuses others. An observer
    leaves the model as it was.

    Attributes:
        check_every: Steps between two calls of ``check``; None never calls it within an epoch.
        rolls_back: Whether it may return ``RollBack``; then the trainer keeps copies of its state in memory: one of the
            epoch's beginning, and with ``snapshot_every`` the last ``snapshots`` ones within the epoch.
        snapshot_every: Steps between two snapshots within an epoch; None takes none.
        snapshots: Number of snapshots within an epoch that are kept.
    """

    check_every: int | None = None
    rolls_back: bool = False
    snapshot_every: int | None = None
    snapshots: int = 2

    def begin(self, trainer: Training) -> None:
        """Prepare for a fit; called before a checkpoint is loaded. Raise here if the trainer does not fit."""

    def after_step(self, number: int, step: Step, y: Tensor) -> None:
        """See a step after the optimiser's; only called where a subclass overrides it.

        Values are on the device: reading one here makes every step slower.

        Args:
            number: Of the step within its epoch, from 1.
            step: The method's result.
            y: Class numbers (B,).
        """

    def check(self, model: nn.Module) -> Stop | RollBack | None:
        """Decide within an epoch, every ``check_every`` steps."""

    def after_epoch(self, epoch: int, model: nn.Module, row: dict[str, Any]) -> dict[str, Any] | Stop | RollBack | None:
        """See an epoch after its validation.

        Args:
            epoch: Number of the epoch, from 1.
            model: The model that is validated and published: with EMA the average.
            row: Its metrics, with those that earlier observers added.

        Returns:
            Metrics to add to the row, a request, or None.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's memory: tensors, numbers, texts and their containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the memory of another observer of this kind."""


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


class OverfittingProbe(Observer):
    """An early sign of robust overfitting that needs no labels: an attack on training against held-out images.

    A model that has memorised its training images under attack is more robust, and locally smoother, on them than on
    images it has not seen. Every ``every`` epochs the probe attacks both halves from several random starts, away from
    the model's own predictions, and adds to the epoch's row

    - ``probe_success_train``, ``probe_success_held_out``: share of end points at which the prediction has changed;
    - ``probe_dispersion_train``, ``probe_dispersion_held_out``: local dispersion (``analysis.local_dispersion``, L2);
    - ``probe_success_gap``: held-out minus training success, with its standard error ``probe_success_gap_stderr``;
    - ``probe_dispersion_gap``: held-out minus training dispersion;
    - ``probe_alarm``: 1 if the success gap exceeds ``threshold`` standard errors, else 0; ``probe_seconds``.

    Cost: ``images * starts * 2 * steps`` forward or input-gradient passes, at the default 512 images, 4 starts and
    PGD-10 41,000, against 1,150,000 in an epoch of PGD-10 training on 50,000 images: 3.6 %.

    Args:
        train: Training images (n, C, H, W) in [0, 1], without augmentation; 256, say.
        held_out: Images that are not trained on (m, C, H, W); 256, say.
        attack: Makes the attack from a model; None means PGD-10 with steps of eps / 4 at the training attack's eps.
        starts: Random starts an image, at least 2.
        every: Epochs between two probes.
        threshold: Standard errors of the success gap that raise the alarm.
        seed: Of the random starts, the same ones in every epoch.

    Raises:
        TypeError, ValueError: Images or numbers that cannot be right; in training, a method without an eps.
    """

    def __init__(
        self,
        train: Tensor,
        held_out: Tensor,
        *,
        attack: Callable[[nn.Module], Attack] | None = None,
        starts: int = 4,
        every: int = 1,
        threshold: float = 3.0,
        seed: int = 0,
    ):
        self.train, self.held_out = check_images(train, name="train"), check_images(held_out, name="held_out")
        self.attack = attack
        self.starts = check_count("starts", starts, at_least=2)
        self.every = check_count("every", every)
        self.threshold = check_number("threshold", threshold, above=0)
        self.seed = seed

    def begin(self, trainer: Training) -> None:
        """Take the training attack's eps where no attack was given."""
        if self.attack is None:
            eps = getattr(trainer.method.attack, "eps", None)
            if eps is None:
                raise ValueError("the method's attack has no eps; give OverfittingProbe an attack=")
            self.attack = functools.partial(_pgd10, eps=eps)

    def after_epoch(self, epoch: int, model: nn.Module, row: dict[str, Any]) -> dict[str, Any] | None:
        """Attack both halves."""
        if epoch % self.every:
            return None
        started = time.perf_counter()
        attack = self.attack(model)
        found = {
            name: local_dispersion(
                model, attack, images, self._predictions(model, images), starts=self.starts, seed=self.seed
            )
            for name, images in (("train", self.train), ("held_out", self.held_out))
        }
        train, held_out = found["train"], found["held_out"]
        gap, stderr = held_out.success - train.success, _stderr(train, held_out)
        return {
            **{f"probe_success_{name}": value.success for name, value in found.items()},
            **{f"probe_dispersion_{name}": value.mean for name, value in found.items()},
            "probe_success_gap": gap,
            "probe_success_gap_stderr": stderr,
            "probe_dispersion_gap": held_out.mean - train.mean,
            "probe_alarm": int(gap > self.threshold * stderr),
            "probe_seconds": time.perf_counter() - started,
        }

    def _predictions(self, model: nn.Module, images: Tensor) -> Tensor:
        device = device_of(model)
        with attacking(model), torch.no_grad():
            return torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(250)])


def _pgd10(model: nn.Module, eps: float) -> Attack:
    return PGD(model, eps, eps / 4, 10)


def _stderr(a: Dispersion, b: Dispersion) -> float:
    """Return the standard error of the difference of two success rates: at most this, with images as the draws."""
    return math.sqrt(sum(p * (1 - p) / len(d.per_sample) for d in (a, b) for p in (d.success,)))
