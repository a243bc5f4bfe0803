"""Checks of the batches that a method is given: the first one in full, later ones by flags that stay on the device."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from at_extensions.checks import (
    check_images,
    check_labels,
    check_logits,
    describe_faults,
    is_about_a_view,
    looks_like_probabilities,
)
from at_extensions.untouched import untouched

READ_EVERY = 200
"""Steps between two readings of the flags in a loop that never calls ``epoch_end``."""


class BatchGuard:
    """Keeps batches that cannot be right from training a model.

    Attributes:
        num_classes: K, known after the first batch; None before.
        limits: Range of the images.
    """

    def __init__(self, limits: tuple[float, float] = (0.0, 1.0)):
        self.limits = limits
        self.num_classes: int | None = None
        self._faults: dict[str, Tensor] = {}
        self._steps = 0

    def first(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Check a whole batch, and the logits of two images in train mode and in eval mode; this reads the device.

        Raises:
            TypeError, ValueError: Images, labels or logits that cannot be right.
        """
        check_images(x, limits=self.limits)
        logits = _logits(model, x[:2], training=True)
        evaluated = _logits(model, x[:2], training=False)
        if logits.shape != evaluated.shape:
            raise ValueError(
                f"the model returns logits {tuple(logits.shape)} in train mode, {tuple(evaluated.shape)} in eval mode"
            )
        if looks_like_probabilities(evaluated):
            raise ValueError(
                "the model returns probabilities, not logits; remove its softmax (cross-entropy applies its own)"
            )
        check_labels(y, logits.shape[1], size=len(x))
        self.num_classes = logits.shape[1]

    def later(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images and labels brought into their ranges, and whether that was needed (a bool on the device).

        Images and labels in range come back with equal values. NaN would spoil BatchNorm's statistics, and a label out
        of range abort a GPU's context, before a flag on the device is read.
        """
        low, high = self.limits
        smallest, largest = x.aminmax()
        first, last = y.aminmax()
        images = ~((smallest >= low) & (largest <= high))  # true for NaN as well
        labels = (first < 0) | (last >= self.num_classes)
        self.flag(f"images outside [{low:g}, {high:g}] or not finite", images)
        self.flag(f"labels that are no class numbers from 0 to {self.num_classes - 1}", labels)
        self._steps += 1
        if self._steps % READ_EVERY == 0:
            self.check()
        x = x.nan_to_num(nan=low).clamp_(low, high)
        return x, y.clamp(0, self.num_classes - 1), images | labels

    def flag(self, fault: str, condition: Tensor) -> None:
        """Note on the device that a batch had a fault where ``condition`` (a bool) is true."""
        condition = condition.detach()
        before = self._faults.get(fault)
        self._faults[fault] = condition if before is None else before.to(condition.device) | condition

    def faults(self) -> list[str]:
        """Return the faults of the batches since the last reading; this reads the device, once."""
        faults, self._faults = self._faults, {}
        if not faults:
            return []
        found = torch.stack(list(faults.values())).tolist()
        return [fault for fault, happened in zip(faults, found) if happened]

    def check(self) -> None:
        """Raise if a batch since the last reading had a fault.

        Raises:
            ValueError: It names the faults.
        """
        faults = self.faults()
        if faults:
            raise ValueError(describe_faults(faults))


def check_kinds(x: Tensor, y: Tensor, index: Tensor | None, *, needs_index: str | None = None) -> Tensor:
    """Check kinds and shapes, which costs no reading of the device, and return the labels as int64.

    Args:
        x: Images (B, C, H, W), floating point.
        y: Class numbers (B,) of any integer dtype.
        index: Numbers of the training samples (B,), or None.
        needs_index: The name of a method that cannot do without ``index``.

    Raises:
        TypeError, ValueError: Another kind or shape.
    """
    check_images(x, values=False)
    check_labels(y, size=len(x), values=False)
    if index is None and needs_index is not None:
        raise ValueError(
            f"{needs_index} remembers each training sample and needs its number: let the loader yield (x, y, index), "
            "as data.make_loader does for data in memory; streams have no such numbers"
        )
    if isinstance(index, Tensor) and (index.shape != y.shape or index.is_floating_point() or index.dtype == torch.bool):
        raise ValueError(
            f"index must hold one whole number a sample, (B,) = {tuple(y.shape)}, got {index.dtype} of shape "
            f"{tuple(index.shape)}"
        )
    return y if y.dtype == torch.int64 else y.long()


def _logits(model: nn.Module, x: Tensor, *, training: bool) -> Tensor:
    """Run a batch through the model without a trace of it, and return its logits (B, K)."""
    with untouched(model, training=training), _uncompiled():
        try:
            logits = model(x)
        except RuntimeError as error:
            if not is_about_a_view(error):
                raise
            raise ValueError(
                "the model flattens its maps by view(), which channels_last does not allow; let it use flatten(), "
                "or train with channels_last=False"
            ) from error
    return check_logits(logits, len(x), mode="train" if training else "eval")


def _uncompiled() -> contextlib.AbstractContextManager:
    """Return a context without torch.compile: a graph for two images would make the next one dynamic in its batch."""
    stance = getattr(torch.compiler, "set_stance", None)
    return contextlib.nullcontext() if stance is None else stance("force_eager")
