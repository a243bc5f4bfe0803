"""The contract of observers of a training run, and what they may ask for: to stop it or to roll it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from at_extensions.methods import Method, Step
from at_extensions.training.history import History


class Training(Protocol):
    """A running training as observers and checkpoints see it: a ``Trainer``.

    Attributes:
        method: The training method, which a remedy may exchange.
        optimizer: The optimiser.
        scheduler: The schedule, or None.
        ema: timm's ModelEmaV3, or None.
        observers: The observers.
        history: The metrics so far.
        val: The batches of the validation, or None.
        rollbacks: How often it was rolled back.
    """

    method: Method
    optimizer: Optimizer
    scheduler: LRScheduler | None
    ema: Any
    observers: list[Observer]
    history: History
    val: Iterable | None
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
