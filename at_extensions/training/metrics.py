"""Measurements during training: sums that stay on the device, and validation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions import processes
from at_extensions.checks import check_images, check_labels, describe_faults, device_of
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
    """Loss, its terms, accuracy and finiteness over an epoch, kept on the device so that no step reads it.

    Args:
        device: Device of the sums.
        class_counts: Training images of each class (K,), to measure accuracy by class and group too.
    """

    def __init__(self, device: torch.device, class_counts: Sequence[int] | None = None):
        # loss * images, correct, images, non-finite steps
        self._sums = torch.zeros(4, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self._terms: dict[str, Tensor] = {}  # name -> (term * images, images)
        self._class_counts = class_counts
        self._by_class = torch.zeros(len(class_counts or ()), 2, dtype=torch.long, device=device)

    @torch.no_grad()
    def add(self, step: Step, y: Tensor) -> None:
        """Count a step."""
        loss = step.loss.detach().float()
        correct = (step.logits.detach().argmax(1) == y).sum()
        finite = torch.isfinite(loss)
        images = torch.full((), len(y), dtype=self._sums.dtype, device=self._sums.device)
        for name, term in step.terms.items():
            value = term.detach().to(self._sums)
            finite = finite & torch.isfinite(value)
            sums = torch.stack([value.nan_to_num() * images, images])
            self._terms[name] = self._terms[name] + sums if name in self._terms else sums
        bad = (~finite).to(self._sums.dtype)
        self._sums += torch.stack([loss.nan_to_num() * images, correct.to(bad.dtype), images, bad])
        if self._class_counts:
            add_by_class(self._by_class, step.logits.detach(), y)

    def read(self, faults: Sequence[str] = ()) -> dict[str, Any]:
        """Read the device and return train_loss, train_accuracy and train_<term>, over all processes.

        With class counts also ``per_class`` and ``groups``, as ``validate`` does, with the one key ``train``.

        Args:
            faults: Of this process's batches, as ``Method.faults`` returns them.

        Raises:
            FloatingPointError: A loss was not finite.
            ValueError: A batch of some process had a fault.
        """
        found = processes.gather((list(faults), sorted(self._terms)))
        if any(faults for faults, _ in found):
            raise ValueError(describe_faults(list(dict.fromkeys(f for faults, _ in found for f in faults))))
        loss, correct, images, bad = add_over_ranks(self._sums.clone()).tolist()
        if bad:
            raise FloatingPointError(
                f"the loss was not finite in {bad:.0f} steps of this epoch; lower the learning rate, clip gradients "
                "(clip_grad=1.0) or use precision='fp32'. The last checkpoint is from before this epoch"
            )
        row = {"train_loss": loss / max(images, 1), "train_accuracy": correct / max(images, 1)}
        row |= self._read_terms(sorted({name for _, names in found for name in names}))
        if not self._class_counts:
            return row
        return row | by_frequency({"train": add_over_ranks(self._by_class.clone())}, self._class_counts)

    def _read_terms(self, names: list[str]) -> dict[str, float]:
        """Return the mean of each term over the images of the steps that had it, in all processes."""
        if not names:
            return {}
        own = torch.stack([self._terms.get(name, self._sums.new_zeros(2)) for name in names])
        return {f"train_{name}": total / images for name, (total, images) in zip(names, add_over_ranks(own).tolist())}


def validate(
    model: nn.Module,
    batches: Iterable,
    attack: Attack | None = None,
    *,
    precision: str = "fp32",
    seed: int = 0,
    class_counts: Sequence[int] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    num_classes: int | None = None,
) -> dict[str, Any]:
    """Measure clean accuracy, and accuracy under an attack where one is given, in eval mode.

    The attack's random starts are the same at every call, so that epochs compare. Over several processes the counts
    are summed: each may hold a part of the data.

    Args:
        model: The classifier; it comes back as it was.
        batches: Yields (images, labels, ...), each time it is iterated over: a loader or a list.
        attack: A torchattacks attack on ``model``.
        precision: ``"fp32"`` or ``"bf16"``.
        seed: Of the attack's random starts.
        class_counts: Training images of each class (K,), to measure by class and group too.
        limits: Range of the images.
        num_classes: K, to check labels against; None checks that they are not negative.

    Returns:
        ``val_clean_accuracy`` and, with an attack, ``val_robust_accuracy``, in [0, 1]. With class counts also, under
        the keys ``val_clean`` and ``val_robust``, ``per_class``: accuracies (K,), and ``groups``: accuracies of
        ``head``, ``medium`` and ``tail`` (``data.frequency_groups``); None where there is no image.

    Raises:
        TypeError, ValueError: Images or labels that cannot be right; no batches.
    """
    attacks = {"val_clean": None} | ({} if attack is None else {"val_robust": attack})
    batches = _Watched(batches, device_of(model), limits, num_classes)
    with autocast(device_of(model), precision):
        if class_counts is None:
            counts = [count_correct(model, batches, attack=a, seed=seed) for a in attacks.values()]
        else:
            classes = len(class_counts)
            counts = [count_correct_by_class(model, batches, classes, attack=a, seed=seed) for a in attacks.values()]
    summed = add_over_ranks(torch.stack(counts))
    batches.check()
    totals = summed.view(len(attacks), -1, 2).sum(1).tolist()
    if totals[0][1] == 0:
        raise ValueError("the validation loader is empty")
    row = {f"{name}_accuracy": right / images for name, (right, images) in zip(attacks, totals)}
    return row if class_counts is None else row | by_frequency(dict(zip(attacks, summed)), class_counts)


class _Watched:
    """Batches whose values are watched on the device while they pass by; a label out of range passes as 0."""

    def __init__(self, batches: Iterable, device: torch.device, limits: tuple[float, float], num_classes: int | None):
        self._batches, self._device, self._limits, self.image_range = batches, device, limits, limits
        self._most = None if num_classes is None else num_classes - 1
        self._bad = torch.zeros(2, dtype=torch.long, device=device)  # batches of bad images, of bad labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y, *_ in self._batches:
            check_images(x, values=False)
            check_labels(y, size=len(x), values=False)
            x, y = x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True).long()
            low, high = x.aminmax()
            known = y.clamp(0, self._most)
            images = ~((low >= self._limits[0]) & (high <= self._limits[1]))
            self._bad += torch.stack([images, (known != y).any()])
            yield x, known

    def check(self) -> None:
        """Raise if values were out of range, in any process."""
        images, labels = add_over_ranks(self._bad).tolist()
        if images:
            low, high = self._limits
            raise ValueError(
                f"validation images must be finite and lie in [{low:g}, {high:g}]; normalisation belongs inside the "
                "model (create_model(..., mean=, std=)), not in the data"
            )
        if labels:
            top = "" if self._most is None else f" to {self._most}"
            raise ValueError(f"validation labels must be class numbers from 0{top}")


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
    """Return both rows as one; where both have a dict, it has the entries of both."""
    return row | {k: row[k] | v if isinstance(v, dict) and k in row else v for k, v in more.items()}


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of metrics, which fit a line of a table."""
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}


def _share(rows: list[list[int]]) -> float | None:
    images = sum(row[1] for row in rows)
    return sum(row[0] for row in rows) / images if images else None
