"""What is measured while training: sums that stay on the device, and validation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.checks import device_of
from at_extensions.data import frequency_groups
from at_extensions.evaluation.accuracy import add_by_class, count_correct, count_correct_by_class
from at_extensions.methods import Step
from at_extensions.processes import add_over_ranks


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which a forward pass runs in ``"fp32"`` or ``"bf16"``."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


class EpochSums:
    """Loss, accuracy and finiteness over an epoch, kept on the device so that no step waits for the host.

    Args:
        device: Where the sums are kept.
        class_counts: Training images of each class (K,), to measure accuracy by class and group too.
    """

    def __init__(self, device: torch.device, class_counts: Sequence[int] | None = None):
        # loss * images, correct, images, non-finite steps
        self._sums = torch.zeros(4, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self._class_counts = class_counts
        self._by_class = torch.zeros(len(class_counts or ()), 2, dtype=torch.long, device=device)

    @torch.no_grad()
    def add(self, step: Step, y: Tensor) -> None:
        """Count a step."""
        loss = step.loss.detach().float()
        correct = (step.logits.detach().argmax(1) == y).sum()
        bad = (~torch.isfinite(loss)).to(self._sums.dtype)
        images = torch.full_like(bad, len(y))
        self._sums += torch.stack([loss.nan_to_num() * images, correct.to(bad.dtype), images, bad])
        if self._class_counts:
            add_by_class(self._by_class, step.logits.detach(), y)

    def read(self) -> dict[str, Any]:
        """Wait for the device and return train_loss, train_accuracy over all processes.

        With class counts also ``per_class`` and ``groups``, as ``validate`` does, with the one key ``train``.

        Raises:
            FloatingPointError: A loss was not finite.
        """
        loss, correct, images, bad = add_over_ranks(self._sums.clone()).tolist()
        if bad:
            raise FloatingPointError(
                f"the loss was not finite in {bad:.0f} steps of this epoch; lower the learning rate, clip gradients "
                "(clip_grad=1.0) or use precision='fp32'. The last checkpoint is from before this epoch"
            )
        row = {"train_loss": loss / max(images, 1), "train_accuracy": correct / max(images, 1)}
        if not self._class_counts:
            return row
        return row | by_frequency({"train": add_over_ranks(self._by_class.clone())}, self._class_counts)


def validate(
    model: nn.Module,
    batches: Iterable,
    attack: Attack | None = None,
    *,
    precision: str = "fp32",
    seed: int = 0,
    class_counts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Measure clean accuracy, and accuracy under an attack where one is given, in eval mode.

    The attack's random starts are the same at every call, so that epochs compare. Over several processes the counts
    are summed: each may hold a part of the data.

    Args:
        model: What is measured; comes back as it was.
        batches: Yields (images, labels, ...), each time it is iterated over: a loader or a list.
        attack: A torchattacks attack on ``model``.
        precision: ``"fp32"`` or ``"bf16"``.
        seed: Of the attack's random starts.
        class_counts: Training images of each class (K,), to measure by class and group too.

    Returns:
        ``val_clean_accuracy`` and, with an attack, ``val_robust_accuracy``, in [0, 1]. With class counts also, under
        the keys ``val_clean`` and ``val_robust``, ``per_class``: accuracies (K,), and ``groups``: accuracies of
        ``head``, ``medium`` and ``tail`` (``data.frequency_groups``); None where there is no image.
    """
    attacks = {"val_clean": None} | ({} if attack is None else {"val_robust": attack})
    with autocast(device_of(model), precision):
        if class_counts is None:
            counts = [count_correct(model, batches, attack=a, seed=seed) for a in attacks.values()]
        else:
            classes = len(class_counts)
            counts = [count_correct_by_class(model, batches, classes, attack=a, seed=seed) for a in attacks.values()]
    summed = add_over_ranks(torch.stack(counts))
    totals = summed.view(len(attacks), -1, 2).sum(1).tolist()
    if totals[0][1] == 0:
        raise ValueError("the validation loader is empty")
    row = {f"{name}_accuracy": right / images for name, (right, images) in zip(attacks, totals)}
    return row if class_counts is None else row | by_frequency(dict(zip(attacks, summed)), class_counts)


def by_frequency(counts: dict[str, Tensor], class_counts: Sequence[int]) -> dict[str, dict]:
    """Return ``per_class`` and ``groups`` of a row of metrics.

    Args:
        counts: By name, samples classified rightly, and samples, of each class (K, 2).
        class_counts: Training images of each class (K,).
    """
    members = frequency_groups(class_counts)
    read = {name: values.tolist() for name, values in counts.items()}
    return {
        "per_class": {name: [_share([row]) for row in rows] for name, rows in read.items()},
        "groups": {
            name: {group: _share([rows[c] for c in classes]) for group, classes in members.items()}
            for name, rows in read.items()
        },
    }


def merged(row: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return both rows as one; of what is a dict in both, the entries of both."""
    return row | {k: row[k] | v if isinstance(v, dict) and k in row else v for k, v in more.items()}


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return what fits a line of a table: the numbers of a row of metrics."""
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}


def _share(rows: list[list[int]]) -> float | None:
    images = sum(row[1] for row in rows)
    return sum(row[0] for row in rows) / images if images else None
