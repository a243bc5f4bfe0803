"""The state of a training run: captured for checkpoints on disk and for snapshots in memory, and restored."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable
from typing import Any

from at_extensions import processes
from at_extensions.runs import load_plain_state_dict, plain_state_dict
from at_extensions.training.history import History
from at_extensions.training.metrics import EpochSums
from at_extensions.training.observers import Observer, Training


def capture(trainer: Training) -> dict[str, Any]:
    """Return all that the coming steps depend on, but the data; tensors are those in use, not copies."""
    return {
        "model": plain_state_dict(trainer.method.model),
        "method": trainer.method.memory(),
        "ema": None if trainer.ema is None else plain_state_dict(trainer.ema.module),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "streams": {name: stream.state_dict() for name, stream in trainer.method.streams().items()},
        "observers": [(type(observer).__name__, observer.state_dict()) for observer in trainer.observers],
    }


def restore(trainer: Training, state: dict[str, Any], *, but: Observer | None = None) -> None:
    """Go on from a captured state; the observer ``but`` keeps its memory.

    Observers come first: on a resume one may repeat a remedy that gives the method other parts.
    """
    for observer, (_, memory) in zip(trainer.observers, state["observers"]):
        if observer is not but:
            observer.load_state_dict(memory)
    load_plain_state_dict(trainer.method.model, state["model"])
    trainer.method.load_memory(state["method"])
    if trainer.ema is not None:
        load_plain_state_dict(trainer.ema.module, state["ema"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.scheduler is not None:
        trainer.scheduler.load_state_dict(state["scheduler"])
    streams = trainer.method.streams()
    if streams.keys() != state["streams"].keys():
        raise ValueError(f"the method has the random streams {sorted(streams)}, the state {sorted(state['streams'])}")
    for name, stream in streams.items():
        stream.load_state_dict(state["streams"][name])


def checkpoint(trainer: Training, train: Iterable) -> dict[str, Any]:
    """Return the state after an epoch, for the run directory; every process calls this."""
    state = capture(trainer)
    return state | {
        "epoch": len(trainer.history.rows),
        "streams": processes.gather(state["streams"]),
        "processes": processes.world_size(),
        "loader": _position(train),
        "rows": trainer.history.rows,
        "best_epoch": trainer.history.best_epoch,
        "stopped": trainer.history.stopped,
        "rollbacks": trainer.rollbacks,
    }


def resume(trainer: Training, state: dict[str, Any], train: Iterable) -> None:
    """Go on from a checkpoint.

    Raises:
        ValueError: It belongs to another model, method, optimiser, set of observers or number of processes.
    """
    saved, now = state.get("processes"), processes.world_size()
    if saved is not None and saved != now:
        raise ValueError(f"the run was saved by {saved} processes and is resumed by {now}; start {saved} of them again")
    try:
        before, own = [name for name, _ in state["observers"]], [type(o).__name__ for o in trainer.observers]
        if before != own:
            raise ValueError(f"the run had the observers {before}, this trainer has {own}")
        restore(trainer, state | {"streams": state["streams"][processes.rank()]})
        if hasattr(train, "load_state_dict"):
            train.load_state_dict(state["loader"])
        trainer.history = History(state["rows"], state["best_epoch"], state["stopped"])
        trainer.rollbacks = state["rollbacks"]
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint belongs to another model, method or optimiser: {error}") from error


def _position(train: Iterable) -> dict | None:
    return train.state_dict() if hasattr(train, "state_dict") else None


class Snapshots:
    """Copies of a run's state within an epoch, in memory: one of its beginning and the last few after it.

    Nothing is copied where no observer may ask to go back.

    Args:
        trainer: The run.
        train: Its loader, before the epoch's first batch is drawn.
        sums: The epoch's sums.
    """

    def __init__(self, trainer: Training, train: Iterable, sums: EpochSums):
        asking = [observer for observer in trainer.observers if observer.rolls_back]
        every = [observer.snapshot_every for observer in asking if observer.snapshot_every]
        self._trainer, self._train = trainer, train
        self._every = min(every, default=None)
        self._kept = max((observer.snapshots for observer in asking), default=0)
        self._loader = copy.deepcopy(_position(train)) if asking else None
        self._copies = [self._copy(0, sums)] if asking else []

    def after(self, step: int, sums: EpochSums) -> None:
        """Take a snapshot after a step, where one is due."""
        if self._every and step % self._every == 0:
            first, *later = self._copies
            later.append(self._copy(step, sums))
            self._copies = [first, *later[-self._kept :]]

    def _copy(self, step: int, sums: EpochSums) -> tuple[int, dict, EpochSums]:
        return step, copy.deepcopy(capture(self._trainer)), copy.deepcopy(sums)

    def go_back(self, now: int, steps: int | None, asking: Observer) -> tuple[int, EpochSums]:
        """Restore the newest snapshot that is ``steps`` steps old (None: the epoch's beginning).

        Returns:
            The step within the epoch after which it was taken, and the sums until then.

        Raises:
            RuntimeError: The observer did not announce that it rolls back.
        """
        if not self._copies:
            name = type(asking).__name__
            raise RuntimeError(f"{name} asks to roll back, but no snapshot was kept; set {name}.rolls_back = True")
        last = 0 if steps is None else max(0, now - steps)
        self._copies = [kept for kept in self._copies if kept[0] <= last] or self._copies[:1]
        step, state, sums = self._copies[-1]
        restore(self._trainer, copy.deepcopy(state), but=asking)
        if self._loader is not None:
            self._train.load_state_dict(copy.deepcopy(self._loader))
        return step, copy.deepcopy(sums)

    def renew(self) -> None:
        """Take the state after a remedy for the oldest one to return to: its method may have other parts."""
        step, _, sums = self._copies[-1]
        self._copies = [self._copy(step, sums)]
        gc.collect()  # a DistributedDataParallel around the method as it was keeps hooks on the parameters
