"""What is measured while training: sums that stay on the device, and validation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.checks import device_of
from at_extensions.evaluation.accuracy import count_correct
from at_extensions.methods import Step
from at_extensions.training.distributed import add_over_ranks


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which a forward pass runs in ``"fp32"`` or ``"bf16"``."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


class EpochSums:
    """Loss, accuracy and finiteness over an epoch, kept on the device so that no step waits for the host."""

    def __init__(self, device: torch.device):
        # loss * images, correct, images, non-finite steps
        self._sums = torch.zeros(4, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)

    @torch.no_grad()
    def add(self, step: Step, y: Tensor) -> None:
        """Count a step."""
        loss = step.loss.detach().float()
        correct = (step.logits.detach().argmax(1) == y).sum()
        bad = (~torch.isfinite(loss)).to(self._sums.dtype)
        images = torch.full_like(bad, len(y))
        self._sums += torch.stack([loss.nan_to_num() * images, correct.to(bad.dtype), images, bad])

    def read(self) -> dict[str, float]:
        """Wait for the device and return train_loss, train_accuracy over all processes.

        Raises:
            FloatingPointError: A loss was not finite.
        """
        loss, correct, images, bad = add_over_ranks(self._sums.clone()).tolist()
        if bad:
            raise FloatingPointError(
                f"the loss was not finite in {bad:.0f} steps of this epoch; lower the learning rate, clip gradients "
                "(clip_grad=1.0) or use precision='fp32'. The last checkpoint is from before this epoch"
            )
        return {"train_loss": loss / max(images, 1), "train_accuracy": correct / max(images, 1)}


def validate(
    model: nn.Module,
    batches: Iterable,
    attack: Attack | None = None,
    *,
    precision: str = "fp32",
    seed: int = 0,
) -> dict[str, float]:
    """Measure clean accuracy, and accuracy under an attack where one is given, in eval mode.

    The attack's random starts are the same at every call, so that epochs compare. Over several processes the counts
    are summed: each may hold a part of the data.

    Args:
        model: What is measured; comes back as it was.
        batches: Yields (images, labels, ...), each time it is iterated over: a loader or a list.
        attack: A torchattacks attack on ``model``.
        precision: ``"fp32"`` or ``"bf16"``.
        seed: Of the attack's random starts.

    Returns:
        ``val_clean_accuracy`` and, with an attack, ``val_robust_accuracy``, in [0, 1].
    """
    with autocast(device_of(model), precision):
        counts = [count_correct(model, batches)]
        if attack is not None:
            counts.append(count_correct(model, batches, attack=attack, seed=seed))
    totals = add_over_ranks(torch.stack(counts)).tolist()
    if totals[0][1] == 0:
        raise ValueError("the validation loader is empty")
    names = ("val_clean_accuracy", "val_robust_accuracy")
    return {name: right / images for name, (right, images) in zip(names, totals, strict=False)}
