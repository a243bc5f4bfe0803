"""Random crop and horizontal flip of whole batches, drawn ahead for a whole epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

AUGMENTATIONS = ("none", "crop", "crop_flip")
"""Augmentations of training images; flips make no sense for digits and house numbers."""


@dataclass(frozen=True)
class CropFlip:
    """One epoch's draws: sample i is cut at (top_i, left_i) of the padded image and mirrored where flip_i says so.

    Args:
        padding: Zero pixels added to each side.
        top: Row offsets (N,) from 0 to 2 ``padding``.
        left: Column offsets (N,) from 0 to 2 ``padding``.
        flip: Whether to mirror (N,); None for never.
    """

    padding: int
    top: Tensor
    left: Tensor
    flip: Tensor | None

    @classmethod
    def draw(cls, n: int, height: int, *, flip: bool, generator: torch.Generator, device: torch.device) -> CropFlip:
        """Draw for ``n`` images of ``height`` pixels; padding is an eighth of it: 4 at 32 pixels, 1 at 8."""
        padding = max(1, height // 8)
        source = generator.device
        top = torch.randint(0, 2 * padding + 1, (n,), generator=generator, device=source).to(device)
        left = torch.randint(0, 2 * padding + 1, (n,), generator=generator, device=source).to(device)
        mirrored = torch.randint(0, 2, (n,), generator=generator, device=source).bool().to(device) if flip else None
        return cls(padding, top, left, mirrored)

    def apply(self, images: Tensor, start: int) -> Tensor:
        """Crop and flip ``images`` (B, C, H, W) of any dtype by the draws of the samples from ``start`` on."""
        part = slice(start, start + len(images))
        height, width = images.shape[-2:]
        padded = functional.pad(images, [self.padding] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (B, C, 2p + 1, 2p + 1, H, W)
        rows = torch.arange(len(images), device=images.device)
        crops = windows[rows, :, self.top[part], self.left[part]]
        if self.flip is None:
            return crops
        return torch.where(self.flip[part, None, None, None], crops.flip(-1), crops)
