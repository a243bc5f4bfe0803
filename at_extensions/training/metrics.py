"""What is measured while training: sums that stay on the device, and validation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.attacks import RandomStream, attacking, perturb
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
        batches: Yields (images, labels, ...).
        attack: A torchattacks attack on ``model``.
        precision: ``"fp32"`` or ``"bf16"``.
        seed: Of the attack's random starts.

    Returns:
        ``val_clean_accuracy`` and, with an attack, ``val_robust_accuracy``, in [0, 1].
    """
    stream = RandomStream(seed)
    counts: Tensor | None = None
    for x, y, *_ in batches:
        with attacking(model), autocast(x.device, precision):
            with torch.no_grad():
                clean = (model(x).argmax(1) == y).sum()
            robust = torch.zeros_like(clean)
            if attack is not None:
                x_adv = perturb(attack, x, y, stream=stream)
                with torch.no_grad():
                    robust = (model(x_adv).argmax(1) == y).sum()
        row = torch.stack([clean, robust, torch.full_like(clean, len(y))])
        counts = row if counts is None else counts + row
    if counts is None:
        raise ValueError("the validation loader is empty")
    clean, robust, images = add_over_ranks(counts).tolist()
    result = {"val_clean_accuracy": clean / images}
    return result | ({} if attack is None else {"val_robust_accuracy": robust / images})
