"""Datasets, splits and loaders: named data sets, long tails, label noise, batches made on the device."""

from at_extensions.data.datasets import DATASETS, load_dataset, load_test, with_label_noise
from at_extensions.data.folder import FolderSplit
from at_extensions.data.label_noise import NOISE_KINDS, corrupt_labels
from at_extensions.data.loader import BatchLoader, make_loader
from at_extensions.data.long_tail import TAIL_KINDS, frequency_groups, is_long_tailed, long_tail_counts
from at_extensions.data.split import ImageSplit, Splits

__all__ = [
    "DATASETS",
    "NOISE_KINDS",
    "TAIL_KINDS",
    "BatchLoader",
    "FolderSplit",
    "ImageSplit",
    "Splits",
    "corrupt_labels",
    "frequency_groups",
    "is_long_tailed",
    "load_dataset",
    "load_test",
    "long_tail_counts",
    "make_loader",
    "with_label_noise",
]
