"""Images and labels read by number, from a tensor, a NumPy array or a map-style dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from at_extensions.checks import check_count, check_images, check_labels


class Samples:
    """The samples of one evaluation; a dataset is read batch by batch, so memory does not grow with its size.

    Rows are numbered from 0 to ``len(samples) - 1``. Each row's fingerprint is taken at its first read, and a later
    read that differs (because of random augmentation, say) is an error: a verdict is about one image.

    Args:
        data: Images (N, C, H, W) in [0, 1], as a float tensor or NumPy array of any precision and memory layout; or a
            map-style dataset whose items start with an image (C, H, W) in [0, 1] and a label.
        labels: Class numbers (N,), of any integer type, for images in a tensor or array.
        n_examples: Take a random subset of this many, drawn by ``seed``; None takes all.
        seed: Draws the subset.
        limits: Another range of images than [0, 1].

    Attributes:
        indices: Position of each row in ``data`` (n,).
        all: Whether the rows are all of ``data``.
        fingerprints: Row -> digest of its image and label, for the rows read so far.

    Raises:
        TypeError: Neither a map-style dataset nor float images with integer labels.
        ValueError: Images outside [0, 1], or fewer samples than ``n_examples``.
    """

    def __init__(
        self,
        data: Any,
        labels: Any = None,
        *,
        n_examples: int | None = None,
        seed: int = 0,
        limits: tuple[float, float] = (0.0, 1.0),
    ):
        self._limits = limits
        self._arrays = is_array(data)
        if self._arrays:
            if labels is None:
                raise TypeError("data are images alone, so labels (B,) are needed too")
            data, labels = as_images(data, "data"), as_labels(labels)
            check_images(data, name="data", limits=limits)
            check_labels(labels, size=len(data))
        elif not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            hint = "; pass loader.dataset" if hasattr(data, "dataset") else ""
            kind = type(data).__name__
            raise TypeError(f"data must be a tensor or array of images or a map-style dataset, got {kind}{hint}")
        elif labels is not None:
            raise TypeError("labels are for a tensor or array of images; a dataset has its own")
        elif len(data) == 0:
            raise ValueError("the dataset is empty")
        self._data, self._labels = data, labels
        self.indices = _draw(len(data), n_examples, seed)
        self.all = len(self.indices) == len(data)
        self.fingerprints: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels of ``rows`` as ``fetch`` does, if they equal those of the first read.

        Raises:
            ValueError: Images outside [0, 1], or different from those of the first read.
        """
        images, labels = self.fetch(rows)
        self._recognise(rows.tolist(), images, labels)
        return images, labels

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 images (B, C, H, W), contiguous, and int64 labels (B,) of the rows (B,).

        Raises:
            ValueError: Images outside [0, 1].
        """
        index = self.indices[rows]
        if self._arrays:
            images = self._data[index.to(self._data.device)]
            labels = self._labels[index.to(self._labels.device)]
        else:
            images, labels = _stack(self._data, index.tolist(), self._limits)
        images = images.detach().float().contiguous()
        return images, labels.to(images.device, torch.int64)

    def digest(self) -> str:
        """Return a hash of every image and label, once all have been read."""
        return hashlib.sha256(b"".join(self.fingerprints[row] for row in range(len(self)))).hexdigest()

    def _recognise(self, rows: Sequence[int], images: Tensor, labels: Tensor) -> None:
        pixels, classes = images.cpu().numpy(), labels.cpu().numpy()
        for i, row in enumerate(rows):
            digest = hashlib.blake2b(classes[i].tobytes(), digest_size=16)
            digest.update(str(pixels.shape[1:]).encode())
            digest.update(pixels[i].data)
            if self.fingerprints.setdefault(row, digest.digest()) != digest.digest():
                raise ValueError(
                    f"sample {int(self.indices[row])} changed between two reads; evaluate a dataset without random "
                    "augmentation, and the same one on every process"
                )


def is_array(data: Any) -> bool:
    """Whether ``data`` are images in one tensor or NumPy array."""
    return isinstance(data, (Tensor, np.ndarray))


def as_images(images: Any, name: str = "images") -> Tensor:
    """Return images (B, C, H, W) of floating point as a tensor; of an array without a copy, where its layout permits.

    Raises:
        TypeError: Integers, such as pixels from 0 to 255.
    """
    if isinstance(images, np.ndarray):
        if images.dtype.kind != "f":
            raise TypeError(
                f"{name} must be floating point in [0, 1], got {images.dtype}; use {name}.astype('float32') / 255, and "
                f"{name}.transpose(0, 3, 1, 2) if its shape is (B, H, W, C)"
            )
        images = _from_numpy(images.astype(np.float32, copy=False))
    if isinstance(images, Tensor) and not images.is_floating_point():
        raise TypeError(f"{name} must be floating point in [0, 1], got {images.dtype}; use {name}.float() / 255")
    return images


def as_labels(labels: Any) -> Tensor:
    """Return class numbers as a tensor; integers of NumPy or of a list become int64."""
    if isinstance(labels, (list, tuple)):
        labels = np.asarray(labels)
    if isinstance(labels, np.ndarray):
        labels = _from_numpy(labels.astype(np.int64) if labels.dtype.kind in "iu" else labels)
    return labels


def _from_numpy(array: np.ndarray) -> Tensor:
    """Share an array's memory, or copy it where torch takes no view of it: negative strides, read-only memory."""
    shared = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if shared else np.array(array, order="C"))


def _draw(total: int, n_examples: int | None, seed: int) -> Tensor:
    if n_examples is None or n_examples == total:
        return torch.arange(total)
    if check_count("n_examples", n_examples) > total:
        raise ValueError(f"n_examples is {n_examples}, but there are only {total} samples")
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n_examples].sort().values


def _stack(dataset: Any, indices: Sequence[int], limits: tuple[float, float]) -> tuple[Tensor, Tensor]:
    items = [dataset[i] for i in indices]
    for i, item in zip(indices, items):
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise TypeError(f"dataset[{i}] must be (image, label), got {type(item).__name__}")
        if not isinstance(item[0], Tensor):
            raise TypeError(
                f"dataset[{i}] gave an image of type {type(item[0]).__name__}; evaluation takes float tensors "
                "(C, H, W) in [0, 1], as torchvision.transforms.ToTensor() makes them"
            )
        if item[0].shape != items[0][0].shape:
            raise ValueError(
                f"dataset[{i}] has shape {tuple(item[0].shape)}, dataset[{indices[0]}] {tuple(items[0][0].shape)}; "
                "resize and crop to one size"
            )
    images = check_images(torch.stack([item[0] for item in items]), name="the dataset's images", limits=limits)
    labels = torch.tensor([int(item[1]) for item in items])
    return images, check_labels(labels)
