"""Saving and restoring a training run, so that a kill at any moment costs at most one epoch."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from at_extensions import processes
from at_extensions.checks import check_count
from at_extensions.runs import KINDS, RunDirectory, atomic, load_tensors, save_state_dict, save_weights
from at_extensions.settings import differences
from at_extensions.training.metrics import numbers


class Checkpointer:
    """Writes a run directory epoch by epoch and reads it back; with no directory it does nothing.

    The state file alone decides where a run goes on: it holds the raw weights and everything else, and it is replaced
    in one step after the weights and metrics that belong to it.

    Args:
        run_dir: The run's folder, or None.
        resume: Go on from the checkpoint there; False refuses a folder that holds a run.
        config: The run's configuration.
        keep_every: Keep the weights of every so-many-th epoch; None keeps none.

    Raises:
        FileExistsError: ``resume=False`` and the folder holds a run.
        ValueError: The folder holds a run of another configuration, or there is none to keep weights in.
    """

    def __init__(
        self,
        run_dir: str | Path | RunDirectory | None,
        *,
        resume: bool,
        config: dict | None,
        keep_every: int | None = None,
    ):
        self.run = run_dir if run_dir is None or isinstance(run_dir, RunDirectory) else RunDirectory(run_dir)
        self._board, self._digests = None, {}
        self._keep_every = None if keep_every is None else check_count("keep_every", keep_every)
        if self.run is None:
            if keep_every is not None:
                raise ValueError("keep_every keeps weights in the run directory; give run_dir too")
            return
        if not resume and self.run.state_path().exists():
            raise FileExistsError(f"{self.run.path} holds a run; resume it or choose another directory")
        if config is not None:
            _agree(self.run, config)
            if processes.is_main():
                self.run.write_config(config)

    def load(self) -> dict | None:
        """Return the state to go on from, or None.

        Raises:
            ValueError: It is damaged.
        """
        return None if self.run is None else self.run.load_state()

    def mend(self, state: dict, model: nn.Module) -> None:
        """Write weights anew that do not belong to a state: damaged ones, or of an epoch that a kill cut short.

        Args:
            state: From ``load``.
            model: With the weights of that state.
        """
        self._digests = dict(state.get("digests", {}))
        if processes.is_main():
            for kind in KINDS:
                if kind in self._digests and self._digests[kind] != _digest(self.run.weights(kind)):
                    self._mend(kind, state, model)
            self._mend_kept(state["epoch"], model)
        processes.barrier()

    def _mend(self, kind: str, state: dict, model: nn.Module) -> None:
        path = self.run.weights(kind)
        if kind == "last" or state["best_epoch"] == state["epoch"]:
            save_weights(model, path)
        else:
            best = self.run.load_state("best")
            if best is None or best["epoch"] != state["best_epoch"]:
                warnings.warn(f"{path} does not belong to this run's state, and cannot be written anew", stacklevel=2)
                return
            save_state_dict(best["model"] if best["ema"] is None else best["ema"], model, path)
        warnings.warn(f"{path} was damaged, or of an epoch that was cut short; it is written anew", stacklevel=2)

    def _mend_kept(self, epoch: int, model: nn.Module) -> None:
        """Discard kept weights of epochs that were cut short; write those of the state's own epoch anew if need be."""
        kept = self._discard_kept(after=epoch)
        for number, path in kept.items():
            expected = self._digests.get(path.stem)
            if expected is not None and expected != _digest(path) and number != epoch:
                warnings.warn(f"{path} is damaged, and cannot be written anew", stacklevel=3)
        own = self.run.kept_path(epoch)
        if own.stem in self._digests and self._digests[own.stem] != _digest(own):
            save_weights(model, own)
            warnings.warn(f"{own} was missing or damaged; it is written anew", stacklevel=3)

    def _discard_kept(self, *, after: int) -> dict[int, Path]:
        """Remove kept weights of later epochs than ``after``: of an epoch that was cut short, or of an earlier run."""
        kept = self.run.kept()
        for number in [number for number in kept if number > after]:
            kept.pop(number).unlink()
        return kept

    def save(self, make_state: Callable[[], dict], model: nn.Module) -> None:
        """Write the weights of ``model`` and the state after an epoch; every process calls this.

        Args:
            make_state: Called by every process; returns ``epoch``, ``best_epoch``, ``rows`` and all else to go on with.
            model: The model that is validated and published.
        """
        if self.run is None:
            return
        state = make_state()
        if processes.is_main():
            self._write(state, model)
        processes.barrier()

    def _write(self, state: dict, model: nn.Module) -> None:
        best = state["best_epoch"] == state["epoch"]
        self._digests["last"] = _digest(save_weights(model, self.run.weights("last")))
        if best:
            _link(self.run.weights("last"), self.run.weights("best"))
            self._digests["best"] = self._digests["last"]
        self._keep(state["epoch"])
        self.run.write_metrics(state["rows"])
        self.run.save_state(state | {"digests": dict(self._digests)})
        if best:
            _link(self.run.state_path("last"), self.run.state_path("best"))
        self._log(state["rows"][-1])

    def _keep(self, epoch: int) -> None:
        """Give the epoch's weights a lasting name where they are due; the state that counts them in comes after."""
        kept = self._discard_kept(after=epoch)
        if self._keep_every is not None and epoch % self._keep_every == 0:
            path = self.run.kept_path(epoch)
            _link(self.run.weights("last"), path)
            self._digests[path.stem] = self._digests["last"]
        elif epoch in kept and kept[epoch].stem not in self._digests:
            kept[epoch].unlink()  # of an earlier run in this folder

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
            groups = {f"{k}_{g}": v for k, values in row.get("groups", {}).items() for g, v in values.items()}
            for key, value in numbers(row | groups).items():
                self._board.add_scalar(key, value, row["epoch"])
            self._board.flush()


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of the tensors in a weights file; None for a missing or damaged file.

    Of the tensors, since safetensors writes the entries of its header in any order.
    """
    try:
        tensors, metadata = load_tensors(path)
    except (FileNotFoundError, ValueError):
        return None
    digest = hashlib.sha256(str(metadata.get("recipe")).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    changed = differences(before, config)
    if changed:
        raise ValueError(
            f"{run.path} holds a run with other settings ({'; '.join(changed)}); "
            "choose another directory, or repeat the old settings to resume it"
        )
