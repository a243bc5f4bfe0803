"""Saving and restoring a training run, so that a kill at any moment costs at most one epoch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from at_extensions.runs import RunDirectory, atomic, save_weights
from at_extensions.training import distributed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from at_extensions.training.trainer import Trainer


class Checkpointer:
    """Writes a run directory epoch by epoch and reads it back; with no directory it does nothing.

    The state file alone decides where a run goes on: it holds the raw weights and everything else, and it is replaced
    in one step after the weights and metrics that belong to it.

    Args:
        run_dir: The run's folder, or None.
        resume: Go on from what is there; False refuses a folder that holds a run.
        config: The run's configuration.

    Raises:
        FileExistsError: ``resume=False`` and the folder holds a run.
        ValueError: The folder holds a run of another configuration.
    """

    def __init__(self, run_dir: str | Path | RunDirectory | None, *, resume: bool, config: dict | None):
        self.run = run_dir if run_dir is None or isinstance(run_dir, RunDirectory) else RunDirectory(run_dir)
        self._board = None
        if self.run is None:
            return
        if not resume and self.run.state_path().exists():
            raise FileExistsError(f"{self.run.path} holds a run; resume it or choose another directory")
        if config is not None:
            _agree(self.run, config)
            if distributed.is_main():
                self.run.write_config(config)

    def restore(self, trainer: Trainer, train: Iterable) -> int:
        """Put a trainer where its run was interrupted; return how many epochs are done.

        Raises:
            ValueError: The state is damaged or belongs to another model or optimiser.
        """
        state = None if self.run is None else self.run.load_state()
        if state is None:
            return 0
        try:
            trainer.method.model.load_state_dict(state["model"])
            _load_memory(trainer.method, state["method"])
            if trainer.ema is not None:
                trainer.ema.module.load_state_dict(state["ema"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            if trainer.scheduler is not None:
                trainer.scheduler.load_state_dict(state["scheduler"])
            trainer.method.stream.load_state_dict(state["streams"][distributed.rank()])
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.run.state_path()} belongs to another model, method, optimiser or number of processes: {error}"
            ) from error
        if hasattr(train, "load_state_dict"):
            train.load_state_dict(state["loader"])
        trainer.history.rows = state["rows"]
        trainer.history.best_epoch = state["best_epoch"]
        return state["epoch"]

    def save(self, trainer: Trainer, train: Iterable, row: dict) -> None:
        """Write what the epoch that ``row`` describes has changed."""
        if self.run is None:
            return
        streams = distributed.gather(trainer.method.stream.state_dict())
        if distributed.is_main():
            self._write(trainer, train, row, streams)
        distributed.barrier()

    def _write(self, trainer: Trainer, train: Iterable, row: dict, streams: list[dict]) -> None:
        best = trainer.history.best_epoch == row["epoch"]
        save_weights(trainer.model, self.run.weights("last"))
        if best:
            _link(self.run.weights("last"), self.run.weights("best"))
        self.run.write_metrics(trainer.history.rows)
        method = {k: v for k, v in trainer.method.state_dict().items() if not k.startswith("model.")}
        self.run.save_state(
            {
                "epoch": row["epoch"],
                "model": trainer.method.model.state_dict(),
                "method": method,
                "ema": None if trainer.ema is None else trainer.ema.module.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
                "loader": train.state_dict() if hasattr(train, "state_dict") else None,
                "streams": streams,
                "rows": trainer.history.rows,
                "best_epoch": trainer.history.best_epoch,
            }
        )
        if best:
            _link(self.run.state_path("last"), self.run.state_path("best"))
        self._log(row)

    def _log(self, row: dict) -> None:
        """Show the row in TensorBoard, where that is installed."""
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._board = False
            else:
                self._board = SummaryWriter(str(self.run.path / "tensorboard"))
        if self._board:
            for key, value in row.items():
                self._board.add_scalar(key, value, row["epoch"])
            self._board.flush()


def _load_memory(method: nn.Module, state: dict) -> None:
    """Load what a method remembers beside its model."""
    missing, unknown = method.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith("model.")]
    if missing or unknown:
        raise ValueError(f"the method remembers other things: missing {missing}, unknown {unknown}")


def _link(source: Path, target: Path) -> None:
    """Give a file, which is only ever replaced and never written to, a second name."""
    with atomic(target) as temporary:
        temporary.unlink()
        os.link(source, temporary)


def _agree(run: RunDirectory, config: dict) -> None:
    """Refuse to go on with a run under another configuration than it was begun with."""
    before = run.config()
    if not run.state_path().exists() or not before:
        return
    changed = sorted(k for k in before.keys() | config.keys() if before.get(k) != config.get(k) and k != "versions")
    if changed:
        raise ValueError(
            f"{run.path} holds a run with another configuration ({', '.join(changed)} differ); "
            "choose another directory, or repeat the old settings to resume it"
        )
