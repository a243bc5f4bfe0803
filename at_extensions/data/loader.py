"""Batches made on the device: a permutation of bytes that already live there, augmented and scaled to [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from at_extensions.checks import check_count, check_name
from at_extensions.data.augment import AUGMENTATIONS, CropFlip
from at_extensions.data.split import ImageSplit, to_unit_interval


def make_loader(
    split: ImageSplit,
    batch_size: int,
    *,
    augment: str = "none",
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """Return a loader of ``(x, y, index)`` batches.

    ``x`` is float32 (B, C, H, W) in [0, 1], ``y`` int64 (B,), ``index`` int64 (B,): each sample's position in
    ``split``. All three are on ``device``.

    An epoch's order and augmentations are drawn when its iteration begins, from ``generator`` alone, so the same
    generator state gives the same batches bit for bit. Under several processes give each the same seed: step i of
    the ranks together is then step i of one process with ``batch_size * world_size``, order and augmentations
    included, no two ranks share a sample, and all make the same number of steps. A last step that is not full is
    shared out evenly; only where it has fewer samples than there are ranks do some repeat.

    Args:
        split: Images in memory, such as ``load_dataset(...).train``.
        batch_size: Samples a step **in each process**.
        augment: ``"none"``, ``"crop"`` (zero padding of an eighth of the height, 4 at 32 pixels, then a random crop
            back to size) or ``"crop_flip"`` (and a horizontal flip with probability one half).
        shuffle: A new order each epoch; otherwise that of the split.
        generator: Source of all randomness; a new one of seed 0 if None. One on the CPU gives the same draws whatever
            the device.
        device: Where images are stored and batches made.
        drop_last: Leave out a last step that is not full.
        rank: This process, from 0.
        world_size: Number of processes.

    Raises:
        TypeError: Not a split, or counts that are not whole numbers.
        ValueError: Numbers out of range, an unknown augmentation, or a split smaller than one full step when
            ``drop_last`` is set.
    """
    if not isinstance(split, ImageSplit):
        raise TypeError(f"split must be an ImageSplit, such as load_dataset(...).train, got {type(split).__name__}")
    check_count("batch_size", batch_size)
    check_name("augmentation", augment, AUGMENTATIONS)
    check_count("world_size", world_size)
    if not 0 <= check_count("rank", rank, at_least=0) < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}) with world_size={world_size}, got {rank}")
    if drop_last and len(split) < batch_size * world_size:
        raise ValueError(
            f"{split.name} has {len(split)} samples, not enough for one step of {batch_size} x {world_size}; use a "
            "smaller batch_size or drop_last=False"
        )
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return BatchLoader(
        split, batch_size, augment, shuffle, generator, torch.device(device), drop_last, rank, world_size
    )


class BatchLoader:
    """Batches of an ``ImageSplit``, made by ``make_loader``; iterate over it once an epoch."""

    def __init__(
        self,
        split: ImageSplit,
        batch_size: int,
        augment: str,
        shuffle: bool,
        generator: torch.Generator,
        device: torch.device,
        drop_last: bool,
        rank: int,
        world_size: int,
    ):
        self.split, self.batch_size, self.augment, self.shuffle = split, batch_size, augment, shuffle
        self.generator, self.device, self.drop_last = generator, device, drop_last
        self.rank, self.world_size = rank, world_size
        self._images = split.images.to(device)
        self._labels = split.labels.to(device)

    def __len__(self) -> int:
        """Return the number of steps in an epoch, the same for every rank."""
        full, rest = divmod(len(self.split), self.batch_size * self.world_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order, crops = self._draw_epoch()
        return (self._batch(order, crops, step) for step in range(len(self)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the coming epochs depend on; meant to be taken between two epochs.

        Taken during an epoch, it continues with the epoch after that one.
        """
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue as the loader that gave ``state`` would have.

        Raises:
            ValueError: The state is not a loader's.
        """
        if set(state) != {"generator"}:
            raise ValueError(f"a loader's state holds 'generator' alone, got {sorted(state)}")
        self.generator.set_state(state["generator"].cpu())

    def _draw_epoch(self) -> tuple[Tensor, CropFlip | None]:
        """Draw the order of all samples and their augmentations, once, so that no batch waits for the host."""
        n = len(self.split)
        if self.shuffle:
            order = torch.randperm(n, generator=self.generator, device=self.generator.device).to(self.device)
        else:
            order = torch.arange(n, device=self.device)
        if self.augment == "none":
            return order, None
        flip = self.augment == "crop_flip"
        height = self.split.image_shape[1]
        return order, CropFlip.draw(n, height, flip=flip, generator=self.generator, device=self.device)

    def _batch(self, order: Tensor, crops: CropFlip | None, step: int) -> tuple[Tensor, Tensor, Tensor]:
        start, stop = self._share(step)
        index = order[start:stop]
        images = self._images.index_select(0, index)
        if crops is not None:
            images = crops.apply(images, start)
        return to_unit_interval(images), self._labels.index_select(0, index), index

    def _share(self, step: int) -> tuple[int, int]:
        """Where this rank's part of a step begins and ends in the epoch's order."""
        first = step * self.batch_size * self.world_size
        size = min(self.batch_size * self.world_size, len(self.split) - first)
        start = first + size * self.rank // self.world_size
        stop = first + size * (self.rank + 1) // self.world_size
        return start, max(stop, start + 1)  # fewer samples than ranks: neighbours repeat one, so that none waits
