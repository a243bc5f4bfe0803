"""Datasets, splits and loaders: named data sets, long tails, label noise, batches made on the device."""

from at_extensions.data.carriers import (
    INJECTIONS,
    carrier_basis,
    carriers,
    count_outside,
    inject,
    injected_range,
    low_pass,
    remove_carriers,
)
from at_extensions.data.datasets import DATASETS, load_dataset, load_test, with_label_noise
from at_extensions.data.folder import FolderSplit
from at_extensions.data.injection import Injection
from at_extensions.data.label_noise import NOISE_KINDS, corrupt_labels
from at_extensions.data.loader import BatchLoader, make_loader
from at_extensions.data.long_tail import TAIL_KINDS, frequency_groups, is_long_tailed, long_tail_counts
from at_extensions.data.split import FloatSplit, ImageSplit, Splits

__all__ = [
    "DATASETS",
    "INJECTIONS",
    "NOISE_KINDS",
    "TAIL_KINDS",
    "BatchLoader",
    "FloatSplit",
    "FolderSplit",
    "ImageSplit",
    "Injection",
    "Splits",
    "carrier_basis",
    "carriers",
    "corrupt_labels",
    "count_outside",
    "frequency_groups",
    "inject",
    "injected_range",
    "is_long_tailed",
    "load_dataset",
    "load_test",
    "long_tail_counts",
    "low_pass",
    "make_loader",
    "remove_carriers",
    "with_label_noise",
]
