"""Splits of a data set: labelled images with a stable index per sample, and the train/val/test trio."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from at_extensions.checks import check_count, check_images, check_labels, check_range


class LabelledSplit(Dataset):
    """A map-style dataset of ``(image, label)`` with known labels: the base of splits in memory and on disk.

    ``split[i]`` is ``(image, label)``: a float32 image (C, H, W) in ``image_range`` and an int. The position ``i`` from
    0 to ``len(split) - 1`` is the sample's index, the one that loaders hand out, and never changes.

    Attributes:
        image_range: Lowest and highest value that images may have; (0.0, 1.0) but for a ``FloatSplit``.
    """

    labels: Tensor
    num_classes: int
    name: str
    class_names: tuple[str, ...] | None
    clean_labels: Tensor | None
    image_range: tuple[float, float] = (0.0, 1.0)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = "x".join(str(side) for side in self.image_shape)
        return f"{self.name}: {len(self)} images {shape}, {self.num_classes} classes of {_span(self.class_counts)}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        raise NotImplementedError

    @property
    def class_counts(self) -> list[int]:
        """How many samples carry each label."""
        return torch.bincount(self.labels, minlength=self.num_classes).tolist()

    def select(self, index: Tensor) -> LabelledSplit:
        """Return the samples at ``index`` (n,), in that order, as a split of its own, numbered from 0."""
        raise NotImplementedError

    def tensors(self, n: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first ``n`` samples (all if None): float32 images (n, C, H, W) in ``image_range``, labels (n,).

        Raises:
            ValueError: There are fewer than ``n`` samples.
        """
        n = len(self) if n is None else self._check_size(n)
        return self._first_images(n), self.labels[:n].clone()

    def subset(self, n: int, seed: int = 0) -> LabelledSplit:
        """Return ``n`` samples, as evenly over the classes as they allow, drawn by ``seed`` and kept in order.

        Every class gives ``n / num_classes`` samples; one that has fewer gives all, and the others make up for it.

        Raises:
            ValueError: There are fewer than ``n`` samples.
        """
        return self.select(self._drawn(n, seed)[:n].sort().values)

    def divide(self, n: int, seed: int = 0) -> tuple[LabelledSplit, LabelledSplit]:
        """Return ``subset(n, seed)``, and the samples that it leaves, in order.

        Raises:
            ValueError: There are no more than ``n`` samples, so that none would be left.
        """
        if check_count("n", n) >= len(self):
            raise ValueError(f"{n} samples of {self.name}, which has {len(self)}, leave none")
        drawn = self._drawn(n, seed)
        return self.select(drawn[:n].sort().values), self.select(drawn[n:].sort().values)

    def _drawn(self, n: int, seed: int) -> Tensor:
        """Return all indices (N,), shuffled so that the first ``n`` are spread evenly over the classes."""
        self._check_size(n)
        ranks = ranks_in_class(self.labels, self.num_classes, seeded_generator(seed))
        return torch.argsort(ranks * self.num_classes + self.labels)  # one of each class, then one more of each, ...

    def _check_size(self, n: int) -> int:
        if check_count("n", n) > len(self):
            raise ValueError(f"asked for {n} samples of {self.name}, which has {len(self)}")
        return n

    def _check_labels(self, size: int) -> None:
        """Check labels and class names, and store labels as int64."""
        check_count("num_classes", self.num_classes, at_least=2)
        self.labels = check_labels(self.labels, self.num_classes, size=size).long()
        if self.clean_labels is None:
            self.clean_labels = self.labels
        self.clean_labels = check_labels(self.clean_labels, self.num_classes, size=size).long()
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"got {len(self.class_names)} class names for {self.num_classes} classes")

    def _first_images(self, n: int) -> Tensor:
        return torch.stack([self[i][0] for i in range(n)])


@dataclass(eq=False, repr=False)
class ImageSplit(LabelledSplit):
    """One split held in memory as bytes.

    Args:
        images: uint8 (N, C, H, W), on the CPU.
        labels: Class numbers (N,); stored as int64.
        num_classes: How many classes there are, K.
        name: Name of the data in reports.
        class_names: K names, where they are known.
        clean_labels: The labels before any were corrupted (N,); ``labels`` if None.

    Raises:
        TypeError: Images that are not uint8, labels that are not whole numbers.
        ValueError: Wrong shapes, no samples, labels out of range.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str = "images"
    class_names: tuple[str, ...] | None = None
    clean_labels: Tensor | None = None

    def __post_init__(self):
        if not isinstance(self.images, Tensor) or self.images.dtype != torch.uint8:
            kind = self.images.dtype if isinstance(self.images, Tensor) else type(self.images).__name__
            raise TypeError(f"images must be a uint8 tensor (N, C, H, W), got {kind}; (images * 255).round().byte()")
        if self.images.ndim != 4 or self.images.numel() == 0:
            raise ValueError(f"images must be a non-empty (N, C, H, W), got {tuple(self.images.shape)}")
        self._check_labels(len(self.images))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_unit_interval(self.images[index]), int(self.labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        return tuple(self.images.shape[1:])

    def select(self, index: Tensor) -> ImageSplit:
        """Return the samples at ``index`` (n,), in that order, as a split of its own, numbered from 0."""
        return replace(
            self, images=self.images[index], labels=self.labels[index], clean_labels=self.clean_labels[index]
        )

    def _first_images(self, n: int) -> Tensor:
        return to_unit_interval(self.images[:n])


@dataclass(eq=False, repr=False)
class FloatSplit(LabelledSplit):
    """One split held in memory as float32 images, which may have a range of their own.

    A method trains on such images once it knows their range, and so does an attack: ``method.image_range =
    split.image_range``, ``attacks.PGD(model, image_range=split.image_range)``.

    Args:
        images: float32 (N, C, H, W), on the CPU.
        labels: Class numbers (N,); stored as int64.
        num_classes: How many classes there are, K.
        name: Name of the data in reports.
        class_names: K names, where they are known.
        clean_labels: The labels before any were corrupted (N,); ``labels`` if None.
        image_range: Lowest and highest value that images may have.

    Raises:
        TypeError: Images that are not float32, labels that are not whole numbers, a range that is not two numbers.
        ValueError: Wrong shapes, no samples, images out of range or not finite, labels out of range.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str = "images"
    class_names: tuple[str, ...] | None = None
    clean_labels: Tensor | None = None
    image_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        self.image_range = check_range(self.image_range)
        check_images(self.images, limits=self.image_range)
        if self.images.dtype != torch.float32:
            raise TypeError(f"images must be float32, got {self.images.dtype}; use images.float()")
        self._check_labels(len(self.images))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].clone(), int(self.labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        return tuple(self.images.shape[1:])

    def select(self, index: Tensor) -> FloatSplit:
        """Return the samples at ``index`` (n,), in that order, as a split of its own, numbered from 0."""
        return replace(
            self, images=self.images[index], labels=self.labels[index], clean_labels=self.clean_labels[index]
        )

    def _first_images(self, n: int) -> Tensor:
        return self.images[:n].clone()


@dataclass(repr=False)
class Splits:
    """A data set ready for training.

    Args:
        train: Training samples, after the tail was cut and labels were corrupted.
        val: For choosing checkpoints and settings: balanced, clean labels. None if none was asked for.
        test: For the final evaluation only.
        num_classes: How many classes there are, K.
        class_counts: Training samples by label, K numbers.
        name: Name of the data in reports.
    """

    train: LabelledSplit
    val: LabelledSplit | None
    test: LabelledSplit
    num_classes: int
    class_counts: list[int]
    name: str

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where they are known."""
        return self.train.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        return self.train.image_shape

    @property
    def image_range(self) -> tuple[float, float]:
        """Lowest and highest value that images of any of the splits may have."""
        lows, highs = zip(*(split.image_range for split in (self.train, self.val, self.test) if split is not None))
        return min(lows), max(highs)

    def to_dict(self) -> dict[str, Any]:
        """Return a description that identifies the splits, in plain numbers and strings."""
        ranged = {} if self.image_range == (0.0, 1.0) else {"image_range": list(self.image_range)}
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
            **ranged,
            "train_size": len(self.train),
            "val_size": 0 if self.val is None else len(self.val),
            "test_size": len(self.test),
            "class_counts": list(self.class_counts),
            "corrupted_labels": int((self.train.labels != self.train.clean_labels).sum()),
        }

    def __repr__(self) -> str:
        shape = "x".join(str(side) for side in self.image_shape)
        lines = [f"{self.name}: {self.num_classes} classes, images {shape}", "split   images  a class"]
        for role, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            if split is None:
                lines.append(f"{role:<6}{0:>8}")
                continue
            lines.append(f"{role:<6}{len(split):>8}  {_span(split.class_counts)}")
        if self.image_range != (0.0, 1.0):
            lines.append("range of values: {:.4g} to {:.4g}".format(*self.image_range))
        corrupted = self.to_dict()["corrupted_labels"]
        return "\n".join(lines + ([f"corrupted training labels: {corrupted}"] if corrupted else []))


def _span(counts: list[int]) -> str:
    """The sizes of classes, in words."""
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def to_unit_interval(images: Tensor) -> Tensor:
    """Return uint8 ``images`` of any shape as new float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def ranks_in_class(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """Shuffle each class and return every sample's place (N,) in its own class, from 0.

    Samples with a rank below n are a random n of each class; those of a smaller n are among them.
    """
    order = torch.randperm(len(labels), generator=generator)
    grouped = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels, minlength=num_classes)
    ranks = torch.empty_like(labels)
    ranks[grouped] = torch.arange(len(labels)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return ranks


def seeded_generator(seed: int, stream: int = 0) -> torch.Generator:
    """Return a CPU generator for ``seed``; different ``stream`` numbers give independent draws.

    Raises:
        TypeError: The seed is not a whole number.
        ValueError: It is negative.
    """
    state = np.random.SeedSequence((check_count("seed", seed, at_least=0), stream)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
