"""Labelled images with perturbations stored in 8 bits, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.attacks import RandomStream, perturb
from at_extensions.data.split import ImageSplit, LabelledSplit, to_unit_interval

_LEVELS = 127  # on each side of zero in int8


def encode(images: Tensor, perturbed: Tensor, eps: float) -> Tensor:
    """Return the perturbations as int8 multiples of eps / 127.

    The nearest multiple, so that ``decode`` errs by at most eps / 254. Entries at the ball's faces are exact; those at
    0 or 1 are rounded outwards, so that ``decode`` clips them back to exactly 0 or 1.

    Args:
        images: Clean images in [0, 1].
        perturbed: Of the same shape, in [0, 1] and at most eps away.
        eps: Linf radius.
    """
    steps = (perturbed - images) * (_LEVELS / eps)
    rounded = torch.where(perturbed <= 0, steps.floor(), torch.where(perturbed >= 1, steps.ceil(), steps.round()))
    return rounded.clamp_(-_LEVELS, _LEVELS).to(torch.int8)


def decode(images: Tensor, codes: Tensor, eps: float) -> Tensor:
    """Return the perturbed images of clean ``images`` (B, C, H, W) in [0, 1] and of what ``encode`` returned."""
    return torch.add(images, codes.to(images.dtype).div_(_LEVELS).mul_(eps)).clamp_(0, 1)


@dataclass(eq=False)
class PerturbedImages:
    """Images in memory, clean or each with a fixed perturbation.

    Attributes:
        images: Clean images, uint8 (N, C, H, W).
        labels: Class numbers (N,).
        eps: Linf radius of the perturbations.
        codes: Perturbations as ``encode`` returns them (N, C, H, W); None where there are none.
        exact: Perturbed images as float32 (N, C, H, W) instead.
    """

    images: Tensor
    labels: Tensor
    eps: float = 0.0
    codes: Tensor | None = None
    exact: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return float32 images (B, C, H, W) in [0, 1] and labels (B,) of the samples at ``index`` (B,)."""
        labels = self.labels[index].to(device)
        if self.exact is not None:
            return self.exact[index].to(device), labels
        images = to_unit_interval(self.images[index].to(device))
        return images if self.codes is None else decode(images, self.codes[index].to(device), self.eps), labels

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all samples in order."""
        for index in torch.arange(len(self)).split(size):
            yield self.batch(index, device)


def clean_images(split: LabelledSplit) -> PerturbedImages:
    """Return a split's images as they are; those of a folder are decoded into memory."""
    images = split.images if isinstance(split, ImageSplit) else (split.tensors()[0] * 255).round_().to(torch.uint8)
    return PerturbedImages(images, split.labels)


def perturb_images(
    clean: PerturbedImages, attack: Attack, *, seed: int, batch_size: int, device: torch.device, exact: bool
) -> PerturbedImages:
    """Return clean images with one perturbation each, toward a higher loss of their own labels.

    Args:
        clean: The images.
        attack: A Linf attack with a radius ``eps``; its model is attacked in eval mode and left as it was.
        seed: Of the random starts.
        batch_size: Images attacked at a time.
        device: Where the model is.
        exact: Keep float32 images instead of 8 bits a value.
    """
    stream, parts = RandomStream(seed), []
    for images, labels in clean.batches(batch_size, device):
        found = perturb(attack, images, labels, stream=stream)
        parts.append((found if exact else encode(images, found, attack.eps)).cpu())
    kept = torch.cat(parts)
    return PerturbedImages(
        clean.images, clean.labels, attack.eps, codes=None if exact else kept, exact=kept if exact else None
    )


@torch.no_grad()
def correct_of(model: nn.Module, data: PerturbedImages, device: torch.device, batch_size: int = 500) -> Tensor:
    """Return which samples a model classifies correctly (N,), in the mode that it is in."""
    return torch.cat([(model(x).argmax(1) == y).cpu() for x, y in data.batches(batch_size, device)])


class PerturbedLoader:
    """Shuffled batches ``(x, y, index)`` for training; a last one that is not full is left out where others are.

    Args:
        data: The samples.
        batch_size: Samples a batch.
        generator: Draws each epoch's order.
        device: Where batches are made.
    """

    def __init__(self, data: PerturbedImages, batch_size: int, generator: torch.Generator, device: torch.device):
        self.data, self.generator, self.device = data, generator, device
        self.batch_size = min(batch_size, len(data))

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(len(self.data), generator=self.generator)
        for index in order.split(self.batch_size)[: len(self)]:
            yield *self.data.batch(index, self.device), index.to(self.device)
