"""Batches of splits: from images in memory that live on the device, or from files that workers decode."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from at_extensions.checks import check_count, check_name
from at_extensions.data.augment import AUGMENTATIONS, CropFlip
from at_extensions.data.folder import AugmentedFiles, FolderSplit
from at_extensions.data.split import FloatSplit, ImageSplit, LabelledSplit, to_unit_interval


def make_loader(
    split: LabelledSplit,
    batch_size: int,
    *,
    augment: str = "none",
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
) -> BatchLoader:
    """Return a loader of ``(x, y, index)`` batches.

    ``x`` is float32 (B, C, H, W) in the split's ``image_range``, which the loader has too; ``y`` int64 (B,); ``index``
    int64 (B,): each sample's position in ``split``. All three are on ``device``. Images in memory are kept on the
    device, as bytes where they come as bytes, and augmented there; those of a folder are decoded and augmented by
    worker processes.

    An epoch's order and augmentations are drawn when its iteration begins, from ``generator`` alone, so the same
    generator state gives the same batches bit for bit. Under several processes give each the same seed: step i of
    the ranks together is then step i of one process with ``batch_size * world_size``, order and augmentations
    included, no two ranks share a sample, and all make the same number of steps. A last step that is not full is
    shared out evenly; only where it has fewer samples than there are ranks do some repeat.

    Args:
        split: The samples, such as ``load_dataset(...).train``.
        batch_size: Samples a step **in each process**.
        augment: ``"none"``, ``"crop"`` (zero padding of an eighth of the height, 4 at 32 pixels, then a random crop
            back to size) or ``"crop_flip"`` (and a horizontal flip with probability one half). For a folder the crop
            is timm's random resized crop, as on ImageNet.
        shuffle: A new order each epoch; otherwise that of the split.
        generator: Source of all randomness; a new one of seed 0 if None. One on the CPU gives the same draws whatever
            the device.
        device: Where batches are made, or taken.
        drop_last: Leave out a last step that is not full.
        rank: This process, from 0.
        world_size: Number of processes.
        workers: Processes that decode a folder's images; as many as there are processors, at most 8, if None. Batches
            do not depend on it.

    Raises:
        TypeError: Not a split, or counts that are not whole numbers.
        ValueError: Numbers out of range, an unknown augmentation, a split smaller than one full step when
            ``drop_last`` is set, workers for images in memory, or crops of images whose range does not hold 0.
    """
    in_memory = isinstance(split, (ImageSplit, FloatSplit))
    if not in_memory and not isinstance(split, FolderSplit):
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
    if workers is not None and check_count("workers", workers) and in_memory:
        raise ValueError("workers decode the images of a folder; images in memory need none")
    low, high = split.image_range
    if augment != "none" and not low <= 0 <= high:
        raise ValueError(f"crops pad images by zeros, which [{low:g}, {high:g}] does not hold; use augment='none'")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    device = torch.device(device)
    common = (split, batch_size, augment, shuffle, generator, device, drop_last, rank, world_size)
    if in_memory:
        return MemoryLoader(*common)
    return FolderLoader(*common, workers=workers or min(8, os.cpu_count() or 1))


class BatchLoader:
    """Batches of a split, made by ``make_loader``; iterate over it once an epoch.

    Attributes:
        image_range: Lowest and highest value of the images.
    """

    def __init__(
        self,
        split: LabelledSplit,
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
        self.image_range = split.image_range
        self._labels = split.labels.to(device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of steps in an epoch, the same for every rank."""
        full, rest = divmod(len(self.split), self.batch_size * self.world_size)
        return full if self.drop_last or not rest else full + 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that later epochs depend on, at best between two epochs.

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

    def _draw_order(self) -> Tensor:
        """An epoch's order (N,) of all samples, on the device; every rank draws the same."""
        if not self.shuffle:
            return torch.arange(len(self.split), device=self.device)
        source = self.generator.device
        return torch.randperm(len(self.split), generator=self.generator, device=source).to(self.device)

    def _share(self, step: int) -> slice:
        """This rank's part of a step, in the epoch's order."""
        first = step * self.batch_size * self.world_size
        size = min(self.batch_size * self.world_size, len(self.split) - first)
        start = first + size * self.rank // self.world_size
        stop = first + size * (self.rank + 1) // self.world_size
        return slice(
            start, max(stop, start + 1)
        )  # fewer samples than ranks: some repeat, so that all ranks make the step


class MemoryLoader(BatchLoader):
    """Batches of a split in memory, whose images live on the device; no batch synchronises with the host."""

    def __init__(self, *common):
        super().__init__(*common)
        self._images = self.split.images.to(self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order, crops = self._draw_order(), self._draw_crops()
        for step in range(len(self)):  # drawn at the first next(): progress bars call iter() more often than once
            yield self._batch(order, crops, self._share(step))

    def _draw_crops(self) -> CropFlip | None:
        """Draw an epoch's augmentations in one go."""
        if self.augment == "none":
            return None
        n, height, flip = len(self.split), self.split.image_shape[1], self.augment == "crop_flip"
        return CropFlip.draw(n, height, flip=flip, generator=self.generator, device=self.device)

    def _batch(self, order: Tensor, crops: CropFlip | None, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        index = order[part]
        images = self._images.index_select(0, index)
        if crops is not None:
            images = crops.apply(images, part.start)
        if images.dtype == torch.uint8:
            images = to_unit_interval(images)
        return images, self._labels.index_select(0, index), index


class FolderLoader(BatchLoader):
    """Batches of a ``FolderSplit``, decoded and augmented by worker processes while the device computes."""

    def __init__(self, *common, workers: int):
        super().__init__(*common)
        self.workers = workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = self._draw_order().cpu()
        seed = 0
        if self.augment != "none":
            seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
        parts = [order[self._share(step)].tolist() for step in range(len(self))]
        decoded = DataLoader(
            AugmentedFiles(self.split, self.augment, seed),
            batch_sampler=parts,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # workers' seeds are drawn from it, and would be from the global one
        )
        for images, part in zip(decoded, parts):
            yield self._batch(images, part)

    def _batch(self, images: Tensor, part: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.tensor(part).to(self.device, non_blocking=True)
        return images.to(self.device, non_blocking=True), self._labels.index_select(0, index), index
