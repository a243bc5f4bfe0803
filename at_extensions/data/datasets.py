"""Data sets by name: read, split off a validation set, cut the tail, corrupt the labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from at_extensions.checks import check_count, check_number, unknown_name
from at_extensions.data.corruptions import read_corruptions
from at_extensions.data.folder import read_folder
from at_extensions.data.injection import Injection
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
    "cifar10c:PATH": "CIFAR-10-C: PATH/CORRUPTION.npy or the folder of all, beside labels.npy; for evaluation alone",
    "cifar100c:PATH": "CIFAR-100-C, likewise",
}
"""Names of data sets, with a line about each."""

_CORRUPTED = {"cifar10c": 10, "cifar100c": 100}
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
    num_classes: int | None = None,
    inject: Injection | None = None,
) -> Splits:
    """Read a data set and return its train, val and test splits; nothing is ever downloaded.

    The validation split is drawn first from the training data: the same number of every class, with clean labels.
    Only then is the rest cut to a long tail and are labels corrupted in it, so ``val_fraction=0`` gives a paper's own
    counts. The test split is the data set's own, whatever the options.

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
        num_classes: Number of classes of an npz file; the largest training label plus one if None. Classes without
            training samples are named in a warning.
        inject: Features to put into the images of all splits, after all else; they become float images that may leave
            [0, 1] (``splits.image_range``).

    Raises:
        FileNotFoundError: The data are not there; the message says how to get them.
        TypeError: Arguments or arrays of the wrong type, or features for images that are not in memory.
        ValueError: An unknown name, numbers out of range, a damaged file, classes too small for the split, images that
            allow no such features.
    """
    check_number("val_fraction", val_fraction, at_least=0, below=1)
    source = _read(str(name_or_path), root, image_size, num_classes)
    if "train" not in source:
        raise ValueError(f"{name_or_path} has a test split alone; it can be evaluated on (load_test), not trained on")
    train, val, test = source["train"], source.get("val"), source["test"]
    _warn_of_gaps(train, "training")
    if val is None and val_fraction > 0:
        train, val = _hold_out(train, val_fraction, seed)
    if imbalance_ratio is not None:
        train = _cut_tail(train, imbalance_ratio, imbalance_kind, seed)
    if label_noise is not None:
        train = with_label_noise(train, label_noise, seed)
    splits = Splits(train, val, test, train.num_classes, train.class_counts, train.name)
    return splits if inject is None else inject.into(splits)


def load_test(
    name_or_path: str | Path,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    severity: int | None = None,
) -> LabelledSplit:
    """Read the test split of a data set, which need not have any other.

    Args:
        name_or_path: One of ``DATASETS``. An npz file may hold ``test_images`` and ``test_labels`` alone, a folder
            ``test/CLASS`` (or ``val/CLASS``) alone; without a training split, ``PATH/classes.txt`` may list all class
            names, one a line in the order of their numbers, where some have no test image.
        root: As for ``load_dataset``.
        image_size: As for ``load_dataset``.
        num_classes: Number of classes K of an npz file, such as of a subset; the largest label plus one if None.
        severity: Of CIFAR-10-C and CIFAR-100-C, from 1 to 5; all five if None.

    Raises:
        FileNotFoundError: The data are not there; the message says how to get them.
        TypeError: Arguments or arrays of the wrong type.
        ValueError: An unknown name, numbers out of range, a damaged file.
    """
    source = _read(str(name_or_path), root, image_size, num_classes, severity)
    if "train" not in source:
        _warn_of_gaps(source["test"], "test")
    return source["test"]


def _read(
    name: str,
    root: str | Path | None,
    image_size: int | None,
    num_classes: int | None = None,
    severity: int | None = None,
) -> dict[str, LabelledSplit]:
    """Read the splits that a data set has."""
    kind, _, path = name.partition(":")
    if name.endswith(".npz") and kind != "npz":
        kind, path = "npz", name
    known = num_classes is not None and not (kind == "npz" and path)
    corrupted = kind in _CORRUPTED and bool(path)
    if severity is not None and not corrupted:
        raise ValueError(f"severity is for cifar10c:PATH and cifar100c:PATH; {name} has no such thing")
    if image_size is not None and not (kind == "folder" and path):
        raise ValueError(f"image_size is for folder:PATH; {name} has images of one size")
    if kind == "folder" and path:
        size = 224 if image_size is None else check_count("image_size", image_size)
        found = read_folder(Path(root or ".") / path, size)
    elif kind == "npz" and path:
        found = read_npz(Path(root or ".") / path, num_classes)
    elif corrupted:
        found = {"test": read_corruptions(Path(root or ".") / path, _CORRUPTED[kind], severity)}
    elif name == "digits":
        found = _read_digits()
    elif name in ("cifar10", "cifar100"):
        found = _read_cifar(name, Path(root or "data"))
    elif name == "svhn":
        found = _read_svhn(Path(root or "data"))
    else:
        raise unknown_name("data set", name, DATASETS)
    if known and found["test"].num_classes != num_classes:
        raise ValueError(f"{name} has {found['test'].num_classes} classes, not {num_classes}")
    return found


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


def _warn_of_gaps(split: LabelledSplit, role: str) -> None:
    """Name the classes without samples: usually the labels start at 1, or the data are a subset."""
    gaps = [c for c, n in enumerate(split.class_counts) if n == 0]
    if gaps:
        listed = ", ".join(str(c) for c in gaps[:10]) + (", ..." if len(gaps) > 10 else "")
        hint = "; do the labels start at 1? Number the classes from 0" if gaps == [0] else ""
        warnings.warn(
            f"{split.name}: {len(gaps)} of {split.num_classes} classes have no {role} sample ({listed}){hint}",
            stacklevel=3,
        )


def _hold_out(train: LabelledSplit, val_fraction: float, seed: int) -> tuple[LabelledSplit, LabelledSplit]:
    """Split off the same number of every class for validation."""
    smallest = min(count for count in train.class_counts if count)
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
    if 0 in train.class_counts:
        raise ValueError(
            f"{train.name} has classes without training samples, so no long tail can be cut; number the classes from 0 "
            "without gaps"
        )
    counts = long_tail_counts(largest_head(train.class_counts, ratio, kind), train.num_classes, ratio, kind)
    return train.select(kept_samples(train.labels, counts, seeded_generator(seed, _TAIL)))


def with_label_noise(train: LabelledSplit, label_noise: float | Sequence, seed: int) -> LabelledSplit:
    """Return a split with labels redrawn at random; its ``clean_labels`` are those of the given one.

    Of one seed, the labels that a rate redraws are among those that a larger rate redraws, and become the same.

    Args:
        train: The split.
        label_noise: A rate in [0, 1], or ``(rate, kind)`` with the kinds of ``corrupt_labels``.
        seed: Which labels are redrawn, and what they become.

    Raises:
        TypeError, ValueError: A rate or a kind that cannot be right.
    """
    if isinstance(label_noise, (tuple, list)) and len(label_noise) != 2:
        raise ValueError(f"label_noise must be a rate or (rate, kind), got {label_noise!r}")
    rate, kind = label_noise if isinstance(label_noise, (tuple, list)) else (label_noise, "uniform")
    noisy = corrupt_labels(train.labels, train.num_classes, rate, kind=kind, generator=seeded_generator(seed, _NOISE))
    return replace(train, labels=noisy)
