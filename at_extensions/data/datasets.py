"""Data sets by name: read, split off a validation set, cut the tail, corrupt the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from at_extensions.checks import check_count, check_number, unknown_name
from at_extensions.data.folder import read_folder
from at_extensions.data.label_noise import corrupt_labels
from at_extensions.data.long_tail import kept_samples, largest_head, long_tail_counts
from at_extensions.data.npz import read_npz
from at_extensions.data.split import ImageSplit, LabelledSplit, Splits, ranks_in_class, seeded_generator

DATASETS = {
    "digits": "1,797 scans of handwritten digits, 8 x 8, gray; comes with scikit-learn",
    "cifar10": "60,000 photographs of 10 classes, 32 x 32, in torchvision's layout",
    "cifar100": "60,000 photographs of 100 classes, 32 x 32, in torchvision's layout",
    "svhn": "99,289 photographs of house numbers, 32 x 32, in torchvision's layout",
    "npz:PATH": "uint8 NHWC arrays train_images, train_labels, test_images, test_labels (and val_*) in one file",
    "folder:PATH": "image files in PATH/train/CLASS and PATH/val/CLASS or PATH/test/CLASS, decoded as they are needed",
}
"""Names that ``load_dataset`` takes, with a line about each."""

_VALIDATION, _TAIL, _NOISE = range(3)  # each random choice has a stream of its own: one leaves the others as they are


def load_dataset(
    name_or_path: str | Path,
    *,
    root: str | Path | None = None,
    val_fraction: float = 0.1,
    imbalance_ratio: float | None = None,
    imbalance_kind: str = "exp",
    label_noise: float | tuple[float, str] | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> Splits:
    """Read a data set and return its train, val and test splits; nothing is ever downloaded.

    The validation split is drawn first from the training data: the same number of every class, with clean labels.
    Only then is the rest cut to a long tail and are labels corrupted in it, so ``val_fraction=0`` gives a paper's own
    counts. The test split is what the data set says it is, whatever the options.

    Args:
        name_or_path: One of ``DATASETS``: ``"digits"``, ``"cifar10"``, ``"cifar100"``, ``"svhn"``, ``"npz:PATH"``
            (a path that ends in ``.npz`` will do) or ``"folder:PATH"``. A folder without ``test`` has ``val`` for
            its test split, as ImageNet does.
        root: Folder of torchvision's data sets and of relative paths; ``data`` for the former and the current
            folder for the latter if None.
        val_fraction: Share in [0, 1) of the smallest class that goes to the validation split; every class gives that
            many samples. 0 for none. Where the data come with a validation split of their own (``val_*`` in an npz
            file, ``val`` beside ``test`` in a folder), that one is used as it is.
        imbalance_ratio: Training samples of the last class over those of the first, in (0, 1]; None leaves the
            classes as they are. The first class has as many samples as lets every class meet its count
            (see ``long_tail_counts``): all of them where classes are of equal size.
        imbalance_kind: ``"exp"`` or ``"step"``.
        label_noise: Probability in [0, 1] that a training label is redrawn, or ``(rate, kind)`` with the kinds of
            ``corrupt_labels``; a rate alone means ``"uniform"``. ``train.clean_labels`` keeps the true ones.
        seed: Which samples are drawn, cut and corrupted.
        image_size: Side in pixels of the images that a folder gives, 224 if None; other data sets have their own.

    Raises:
        FileNotFoundError: The data are not there; the message says how to get them.
        TypeError: Arguments or arrays of the wrong type.
        ValueError: An unknown name, numbers out of range, a damaged file, classes too small for what was asked.
    """
    check_number("val_fraction", val_fraction, at_least=0, below=1)
    source = _read(str(name_or_path), root, image_size)
    train, val, test = source["train"], source.get("val"), source["test"]
    _check_every_class(train)
    if val is None and val_fraction > 0:
        train, val = _hold_out(train, val_fraction, seed)
    if imbalance_ratio is not None:
        train = _cut_tail(train, imbalance_ratio, imbalance_kind, seed)
    if label_noise is not None:
        train = _corrupt(train, label_noise, seed)
    return Splits(train, val, test, train.num_classes, train.class_counts, train.name)


def _read(name: str, root: str | Path | None, image_size: int | None) -> dict[str, LabelledSplit]:
    """Find the reader that a name asks for."""
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        size = 224 if image_size is None else check_count("image_size", image_size)
        return read_folder(Path(root or ".") / path, size)
    if image_size is not None:
        raise ValueError(f"image_size is for folder:PATH; {name} has images of one size")
    if kind == "npz" and path:
        return read_npz(Path(root or ".") / path)
    if name.endswith(".npz"):
        return read_npz(Path(root or ".") / name)
    if name == "digits":
        return _read_digits()
    if name in ("cifar10", "cifar100"):
        return _read_cifar(name, Path(root or "data"))
    if name == "svhn":
        return _read_svhn(Path(root or "data"))
    raise unknown_name("data set", name, DATASETS)


def _read_digits() -> dict[str, ImageSplit]:
    """Scikit-learn's digits; every fifth image of each class is for testing, whatever the seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]  # gray levels 0 to 16
    labels = torch.from_numpy(digits.target.astype(np.int64))
    place = (torch.nn.functional.one_hot(labels).cumsum(0) - 1).gather(1, labels[:, None]).squeeze(1)
    everything = ImageSplit(images, labels, 10, "digits", tuple("0123456789"))
    testing = place % 5 == 4
    return {"train": everything.select(~testing), "test": everything.select(testing)}


def _read_cifar(name: str, root: Path) -> dict[str, ImageSplit]:
    from torchvision.datasets import CIFAR10, CIFAR100

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    splits = {}
    for role in ("train", "test"):
        part = _open_torchvision(dataset, root, train=role == "train")
        images = torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)))
        splits[role] = ImageSplit(images, torch.tensor(part.targets), len(part.classes), name, tuple(part.classes))
    return splits


def _read_svhn(root: Path) -> dict[str, ImageSplit]:
    from torchvision.datasets import SVHN

    splits = {}
    for role in ("train", "test"):
        part = _open_torchvision(SVHN, root, split=role)
        images = torch.from_numpy(np.ascontiguousarray(part.data))
        splits[role] = ImageSplit(images, torch.from_numpy(part.labels), 10, "svhn", tuple("0123456789"))
    return splits


def _open_torchvision(dataset: type, root: Path, **options):
    """Open a torchvision data set, which checks each file's digest before it reads it."""
    try:
        return dataset(root, **options)
    except RuntimeError as error:
        name = dataset.__name__
        part = "".join(f", {key}={value!r}" for key, value in options.items())
        raise FileNotFoundError(
            f"{name} is missing or damaged under {str(root)!r}; point root at the folder that holds it, or fetch it: "
            f"from torchvision.datasets import {name}; {name}({str(root)!r}{part}, download=True)"
        ) from error


def _check_every_class(train: LabelledSplit) -> None:
    """Refuse labels with gaps: a class without training samples breaks counts, weights and balance."""
    present = torch.unique(train.labels)
    if len(present) < train.num_classes:
        raise ValueError(
            f"the training labels of {train.name} run to {train.num_classes - 1} but only {len(present)} classes have "
            "samples; number the classes from 0 without gaps"
        )


def _hold_out(train: LabelledSplit, val_fraction: float, seed: int) -> tuple[LabelledSplit, LabelledSplit]:
    """Split off the same number of every class for validation."""
    smallest = min(train.class_counts)
    per_class = round(val_fraction * smallest)
    if not 0 < per_class < smallest:
        raise ValueError(
            f"the smallest class of {train.name} has {smallest} training samples, of which val_fraction="
            f"{val_fraction:g} takes {per_class}: at least one must be taken and one left; use another val_fraction, "
            "or 0 for no validation split"
        )
    held_out = ranks_in_class(train.labels, train.num_classes, seeded_generator(seed, _VALIDATION)) < per_class
    return train.select(~held_out), train.select(held_out)


def _cut_tail(train: LabelledSplit, ratio: float, kind: str, seed: int) -> LabelledSplit:
    counts = long_tail_counts(largest_head(train.class_counts, ratio, kind), train.num_classes, ratio, kind)
    return train.select(kept_samples(train.labels, counts, seeded_generator(seed, _TAIL)))


def _corrupt(train: LabelledSplit, label_noise: float | Sequence, seed: int) -> LabelledSplit:
    if isinstance(label_noise, (tuple, list)) and len(label_noise) != 2:
        raise ValueError(f"label_noise must be a rate or (rate, kind), got {label_noise!r}")
    rate, kind = label_noise if isinstance(label_noise, (tuple, list)) else (label_noise, "uniform")
    noisy = corrupt_labels(train.labels, train.num_classes, rate, kind=kind, generator=seeded_generator(seed, _NOISE))
    return replace(train, labels=noisy)
