"""CIFAR-10-C and CIFAR-100-C: corrupted test images in npy files, five severities one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from at_extensions.checks import check_count
from at_extensions.data.npz import checked_images, checked_labels, to_nchw
from at_extensions.data.split import ImageSplit

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The fifteen corruptions of the benchmark (Hendrycks & Dietterich, 2019); the four others are for validation."""
SEVERITIES = 5


def read_corruptions(path: Path, num_classes: int, severity: int | None) -> ImageSplit:
    """Return corrupted test images.

    Args:
        path: One corruption, ``FOLDER/fog.npy`` (``FOLDER/fog`` will do), beside ``FOLDER/labels.npy``; or the folder
            for all corruptions in it, one after the other: those of the benchmark's fifteen where it holds any.
        num_classes: 10 or 100.
        severity: From 1 to 5; all five if None.

    Raises:
        FileNotFoundError: No such file.
        TypeError: Arrays of another dtype.
        ValueError: A damaged file, arrays of another shape, a severity out of range, labels out of range.
    """
    if severity is not None and check_count("severity", severity) > SEVERITIES:
        raise ValueError(f"severity must lie in 1 to {SEVERITIES}, got {severity}")
    if path.is_dir():
        folder = path
        present = sorted(p.stem for p in folder.glob("*.npy") if p.stem != "labels")
        names = [name for name in CORRUPTIONS if name in present] or present
    else:
        folder, names = path.parent, [path.name.removesuffix(".npy")]
    if not names or not (folder / "labels.npy").is_file():
        raise FileNotFoundError(f"{folder} must hold labels.npy and the corruptions, such as {CORRUPTIONS[0]}.npy")
    labels = checked_labels("labels.npy", _load(folder / "labels.npy"))
    part = _part(len(labels), severity, folder)
    images = [np.array(_images(folder / f"{name}.npy", len(labels))[part]) for name in names]
    label = torch.from_numpy(np.tile(labels[part], len(names)))
    title = names[0] if len(names) == 1 else f"{len(names)} corruptions"
    title += "" if severity is None else f", severity {severity}"
    return ImageSplit(to_nchw(np.concatenate(images)), label, num_classes, title)


def _part(total: int, severity: int | None, folder: Path) -> slice:
    if severity is None:
        return slice(None)
    if total % SEVERITIES:
        raise ValueError(f"{folder}: {total} labels are not {SEVERITIES} severities of equal size; leave severity out")
    size = total // SEVERITIES
    return slice((severity - 1) * size, severity * size)


def _images(path: Path, expected: int) -> np.ndarray:
    images = checked_images(path.name, _load(path))
    if len(images) != expected:
        raise ValueError(f"{path} holds {len(images)} images, labels.npy {expected} labels")
    return images


def _load(path: Path) -> np.ndarray:
    """Map an array into memory; pickled objects are refused."""
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.npy") if p.stem != "labels")) or "none"
        raise FileNotFoundError(f"no file {path}; corruptions there: {known}")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no npy file: {error}") from error
