"""Data sets in one npz file: uint8 NHWC arrays, the layout that MedMNIST uses too."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from at_extensions.checks import check_count
from at_extensions.data.split import ImageSplit

_LAYOUT = "train_images, train_labels, test_images, test_labels and optionally val_images, val_labels"
_ALONE = "test_images and test_labels alone are enough for an evaluation"
_DENSE = 100  # labels may run to this many times the number of classes that occur, and to 1,000 in any case


def read_npz(path: Path, num_classes: int | None = None) -> dict[str, ImageSplit]:
    """Return the splits ``"train"``, ``"val"`` and ``"test"`` that the file has: the test split at least.

    Images are uint8 (N, H, W, C), or (N, H, W) if gray; labels whole numbers (N,) or (N, 1).

    Args:
        path: The file.
        num_classes: Number of classes; the largest label of the training split (without one, of the test split) plus
            one if None.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: Arrays of another dtype.
        ValueError: Not an npz file or a damaged one, keys missing, wrong shapes, labels out of range.
    """
    arrays = _read_arrays(path)
    roles = [role for role in ("train", "val", "test") if f"{role}_images" in arrays]
    images = {role: checked_images(f"{role}_images", arrays[f"{role}_images"]) for role in roles}
    labels = {role: checked_labels(f"{role}_labels", arrays[f"{role}_labels"]) for role in roles}
    first = roles[0]
    given = num_classes is not None
    num_classes = count_classes(labels[first], num_classes, str(path))
    for role in roles:
        if len(images[role]) != len(labels[role]):
            raise ValueError(f"{path}: {len(labels[role])} {role}_labels for {len(images[role])} {role}_images")
        if images[role].shape[1:] != images[first].shape[1:]:
            raise ValueError(
                f"{path}: {role}_images are {images[role].shape[1:]}, {first}_images {images[first].shape[1:]}"
            )
        low, high = labels[role].min(), labels[role].max()
        if low < 0 or high >= num_classes:
            bound = "by num_classes" if given else f"the largest {'training' if first == 'train' else first} label"
            raise ValueError(f"{path}: {role}_labels must lie in 0 to {num_classes - 1}, {bound}, got {low} to {high}")
    return {
        role: ImageSplit(to_nchw(images[role]), torch.from_numpy(labels[role]), num_classes, path.stem)
        for role in roles
    }


def count_classes(labels: np.ndarray, num_classes: int | None, source: str) -> int:
    """Return ``num_classes``, or the largest label plus one if None.

    Raises:
        ValueError: The labels are too far apart to be class numbers.
    """
    if num_classes is not None:
        return check_count("num_classes", num_classes, at_least=2)
    highest, present = int(labels.max(initial=0)), len(np.unique(labels))
    if highest >= max(1000, _DENSE * present):
        raise ValueError(
            f"{source}: the labels run to {highest} but only {present} classes occur, so these are no class numbers; "
            "number the classes from 0, or give num_classes"
        )
    return highest + 1


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of the layout that the file holds; pickled objects are refused."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; an npz data set holds {_LAYOUT} (np.savez); {_ALONE}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no npz file, or was cut short; np.savez writes one")
    wanted = {"test_images", "test_labels"}
    try:
        with np.load(path, allow_pickle=False) as archive:
            present = set(archive.files)
            for role in ("train", "val"):
                if present & {f"{role}_images", f"{role}_labels"}:
                    wanted |= {f"{role}_images", f"{role}_labels"}
            if "val_images" in wanted:
                wanted |= {"train_images", "train_labels"}
            if wanted <= present:
                return {key: np.asarray(archive[key]) for key in wanted}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged, or holds something other than plain arrays: {error}") from error
    raise ValueError(
        f"{path} lacks {sorted(wanted - present)}; an npz data set holds {_LAYOUT}, found {sorted(present)}; {_ALONE}"
    )


def checked_images(key: str, images: np.ndarray) -> np.ndarray:
    """Return images (N, H, W, C) of an array that holds bytes.

    Raises:
        TypeError: Another dtype.
        ValueError: Another shape, or no images.
    """
    if images.dtype != np.uint8:
        raise TypeError(
            f"{key} must be uint8 NHWC in 0 to 255, got {images.dtype}; images in [0, 1] become "
            "(images * 255).round().astype('uint8')"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.size == 0:
        raise ValueError(f"{key} must be a non-empty (N, H, W, C), or (N, H, W) if gray, got {images.shape}")
    if images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise ValueError(f"{key} look like NCHW, shape {images.shape}; use images.transpose(0, 2, 3, 1)")
    return images


def checked_labels(key: str, labels: np.ndarray) -> np.ndarray:
    """Return labels (N,), int64, of an array (N,) or (N, 1) of whole numbers.

    Raises:
        TypeError: Another dtype.
        ValueError: Another shape.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{key} must be whole class numbers, got {labels.dtype}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(f"{key} must have shape (N,) or (N, 1), one class number an image, got {labels.shape}")
    return labels.astype(np.int64)


def to_nchw(images: np.ndarray) -> torch.Tensor:
    """Return images (N, H, W, C) as a contiguous tensor (N, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
