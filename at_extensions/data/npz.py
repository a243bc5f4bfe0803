"""Data sets in one npz file: uint8 NHWC arrays, the layout that MedMNIST uses too."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from at_extensions.data.split import ImageSplit

_LAYOUT = "train_images, train_labels, test_images, test_labels and optionally val_images, val_labels"


def read_npz(path: Path) -> dict[str, ImageSplit]:
    """Return the splits ``"train"``, ``"test"`` and, where the file has it, ``"val"``.

    Images are uint8 (N, H, W, C), or (N, H, W) if gray; labels whole numbers (N,) or (N, 1). There are as many
    classes as the largest training label says.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: Arrays of another dtype.
        ValueError: Not an npz file or a damaged one, keys missing, wrong shapes, labels out of range.
    """
    arrays = _read_arrays(path)
    roles = ("train", "val", "test") if "val_images" in arrays else ("train", "test")
    images = {role: _checked_images(f"{role}_images", arrays[f"{role}_images"]) for role in roles}
    labels = {role: _checked_labels(f"{role}_labels", arrays[f"{role}_labels"]) for role in roles}
    num_classes = int(labels["train"].max(initial=0)) + 1
    for role in roles:
        if len(images[role]) != len(labels[role]):
            raise ValueError(f"{path}: {len(labels[role])} {role}_labels for {len(images[role])} {role}_images")
        if images[role].shape[1:] != images["train"].shape[1:]:
            raise ValueError(
                f"{path}: {role}_images are {images[role].shape[1:]}, train_images {images['train'].shape[1:]}"
            )
        low, high = labels[role].min(), labels[role].max()
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{path}: {role}_labels must lie in 0 to {num_classes - 1}, the largest training label, "
                f"got {low} to {high}"
            )
    return {
        role: ImageSplit(_to_nchw(images[role]), torch.from_numpy(labels[role]), num_classes, path.stem)
        for role in roles
    }


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of the layout that the file holds; pickled objects are refused."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; an npz data set holds {_LAYOUT} (np.savez)")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no npz file, or was cut short; np.savez writes one")
    wanted = {"train_images", "train_labels", "test_images", "test_labels"}
    try:
        with np.load(path, allow_pickle=False) as archive:
            present = set(archive.files)
            if present & {"val_images", "val_labels"}:
                wanted |= {"val_images", "val_labels"}
            if wanted <= present:
                return {key: np.asarray(archive[key]) for key in wanted}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged, or holds something other than plain arrays: {error}") from error
    raise ValueError(
        f"{path} lacks {sorted(wanted - present)}; an npz data set holds {_LAYOUT}, found {sorted(present)}"
    )


def _checked_images(key: str, images: np.ndarray) -> np.ndarray:
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


def _checked_labels(key: str, labels: np.ndarray) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{key} must be whole class numbers, got {labels.dtype}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(f"{key} must have shape (N,) or (N, 1), one class number an image, got {labels.shape}")
    return labels.astype(np.int64)


def _to_nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
