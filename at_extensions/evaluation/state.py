"""The record of an evaluation on disk: one file a finished batch, tied to the model, the data and the settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from at_extensions.runs import load_tensors, save_tensors, write_json


@dataclass(frozen=True, eq=False)
class Batch:
    """The result of one attack on one numbered batch.

    Attributes:
        number: The batch's number within its attack.
        rows: The samples attacked (B,).
        broken: Which of them have an adversarial example (B,).
        predictions: Classes predicted for the adversarial examples, or for the images without one (B,).
        adversarial: Adversarial examples of the first of the broken ones, or of all (M, C, H, W).
        seconds: Time it took.
        zero_gradients: Samples at which the attack met a gradient of zero.
        contradicted: Samples that the model misclassifies in a second pass.
    """

    number: int
    rows: Tensor
    broken: Tensor
    predictions: Tensor
    adversarial: Tensor
    seconds: float
    zero_gradients: int = 0
    contradicted: int = 0

    def keep(self, count: int | None) -> Batch:
        """Return the batch with only the first ``count`` adversarial images; all if None."""
        return replace(self, adversarial=self.adversarial[:count].clone())


_TENSORS = ("rows", "broken", "predictions", "adversarial")
_NUMBERS = ("number", "seconds", "zero_gradients", "contradicted")


class Store:
    """The folder that finished batches are written to and read from; without a folder, nothing is stored.

    Args:
        directory: The folder, or None.
    """

    def __init__(self, directory: str | Path | None):
        self.directory = None if directory is None else Path(directory)

    def claim(self, settings: Mapping[str, Any], *, write: bool = True) -> None:
        """Tie the folder to an evaluation, or check that it is tied to this one.

        Args:
            settings: Everything that the verdicts depend on, as JSON.
            write: Whether this process writes the settings of a new folder.

        Raises:
            ValueError: The folder belongs to another evaluation; the message names the differences.
        """
        if self.directory is None:
            return
        path = self.directory / "evaluation_state.json"
        if not path.exists():
            if any(self.directory.glob("*/*.safetensors")):
                raise ValueError(f"{self.directory} holds batches but no {path.name}; give another state_dir")
            if write:
                write_json(path, dict(settings))
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{path} is not the state of an evaluation; give another state_dir")
        wanted = json.loads(json.dumps(dict(settings)))
        other = [key for key in wanted if found.get(key) != wanted[key]]
        if other:
            raise ValueError(
                f"{self.directory} holds the state of another evaluation: it differs in {', '.join(other)}; "
                "give another state_dir, or delete this one to start again"
            )

    def save(self, attack: str, batch: Batch) -> None:
        """Write a finished batch, whole or not at all."""
        if self.directory is not None:
            tensors = {name: getattr(batch, name) for name in _TENSORS}
            numbers = {name: getattr(batch, name) for name in _NUMBERS}
            save_tensors(self._path(attack, batch.number), tensors, {"batch": json.dumps(numbers)})

    def load(self, attack: str, number: int, rows: Tensor) -> Batch | None:
        """Return a finished batch, or None where there is none that can be read.

        Raises:
            ValueError: It is about other samples than ``rows``.
        """
        if self.directory is None:
            return None
        try:
            tensors, metadata = load_tensors(self._path(attack, number))
            batch = Batch(**tensors, **json.loads(metadata["batch"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # absent or damaged: attacked once more
            return None
        if not torch.equal(batch.rows, rows):
            raise ValueError(f"{self._path(attack, number)} is about other samples; give another state_dir")
        return batch

    def _path(self, attack: str, number: int) -> Path:
        return self.directory / attack / f"{number:06d}.safetensors"


def weights_digest(model: Callable) -> str:
    """Return a hash of a module's architecture and state; of anything else that can be called, of its type."""
    if not isinstance(model, nn.Module):
        return f"{type(model).__module__}.{type(model).__qualname__}"
    architecture = re.sub(r"0x[0-9a-f]+", "", repr(model))  # without addresses of functions
    return hashlib.sha256((architecture + state_digest(model)).encode()).hexdigest()


def state_digest(model: nn.Module) -> str:
    """Return a hash of a module's state dict: names, types, shapes and values, wherever they lie in memory."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
