"""Data sets with injected features: carriers in every image of a split, by class or drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from at_extensions.checks import check_count, check_name
from at_extensions.data.carriers import INJECTIONS, carriers, check_beta, inject, injected_range
from at_extensions.data.split import FloatSplit, LabelledSplit, Splits, seeded_generator

_STREAM = 16  # the first of three streams of a seed, for the carriers of train, val and test
_AT_ONCE = 1000  # images


@dataclass(frozen=True)
class Injection:
    """Features that are put into every image of a data set.

    An image gets the carrier of its true class, whatever became of its label. Permuted, each image gets a carrier that
    is drawn at random, whatever its class: the same pixels change as much, and tell nothing of the class.

    Attributes:
        beta: Amplitude in [0, 1], such as 8/255.
        mode: One of ``INJECTIONS``; see ``inject``.
        permuted: Draw carriers at random.
        seed: Of those draws.

    Raises:
        TypeError: A beta that is not a number, a seed that is not a whole number.
        ValueError: A beta outside [0, 1], an unknown mode, a negative seed.
    """

    beta: float
    mode: str = "add"
    permuted: bool = False
    seed: int = 0

    def __post_init__(self):
        check_beta(self.beta)
        check_name("mode", self.mode, INJECTIONS)
        check_count("seed", self.seed, at_least=0)

    @classmethod
    def recorded(cls, data: Mapping[str, Any]) -> Injection | None:
        """Return the injection of a run's data from its ``config.yaml``, or None where nothing was injected."""
        if data.get("inject_beta") is None:
            return None
        return cls(data["inject_beta"], data["inject_mode"], data["inject_permuted"], data["inject_seed"])

    def into(self, splits: Splits) -> Splits:
        """Return the data set with features in the images of all its splits.

        Raises:
            TypeError: Images that are not in memory.
            ValueError: Images outside [0, 1], an odd side, or more classes than the images allow.
        """
        train, val, test = (
            None if split is None else self.into_split(split, role)
            for role, split in enumerate((splits.train, splits.val, splits.test))
        )
        return Splits(train, val, test, splits.num_classes, splits.class_counts, splits.name)

    def into_split(self, split: LabelledSplit, role: int) -> FloatSplit:
        """Return one split with features in its images.

        Args:
            split: Images in [0, 1], in memory.
            role: 0 for training, 1 for validation, 2 for test: permuted carriers are drawn for each by themselves.

        Raises:
            TypeError: Images that are not in memory.
            ValueError: Images outside [0, 1], an odd side, or more classes than the images allow.
        """
        if not hasattr(split, "images"):
            raise TypeError(f"features are injected into images in memory; {split.name} decodes its images from files")
        if split.image_range[0] < 0 or split.image_range[1] > 1:
            raise ValueError(f"features are injected into images in [0, 1], {split.name} has another range")
        patterns = carriers(split.num_classes, split.image_shape)
        numbers = self._numbers(split, role)
        images = torch.empty(len(split), *split.image_shape)
        for part in torch.arange(len(split)).split(_AT_ONCE):
            x = split.select(part).tensors()[0]
            images[part] = inject(x, numbers[part], patterns, self.beta, mode=self.mode)
        return FloatSplit(
            images,
            split.labels,
            split.num_classes,
            split.name,
            split.class_names,
            split.clean_labels,
            injected_range(patterns, self.beta, self.mode),
        )

    def _numbers(self, split: LabelledSplit, role: int) -> Tensor:
        """Return the number of each image's carrier (N,)."""
        if not self.permuted:
            return split.clean_labels
        return torch.randint(split.num_classes, (len(split),), generator=seeded_generator(self.seed, _STREAM + role))
