"""The definition of a study: its arms, seeds, scales and pairs, and how a trained run is measured.

The page docs/study.md shows how to plan, run, share and read one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from at_extensions.checks import check_count, check_name
from at_extensions.experiments.cell import Cell
from at_extensions.experiments.robust_accuracy import RobustAccuracy
from at_extensions.runs import RunDirectory
from at_extensions.settings import TrainSettings


@dataclass(frozen=True)
class Arm:
    """One alternative that a study compares.

    Attributes:
        options: Options of ``at_extensions.train`` beside those that all arms share, which they override.
        description: A few words for a reader.
    """

    options: Mapping[str, Any]
    description: str = ""


Measure = Callable[[RunDirectory, Cell], dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A question, the arms that answer it, and what they share.

    Attributes:
        question: What is asked, in a sentence.
        arms: Name -> arm. Names become file names: letters, digits, ``_``, ``.``, ``-`` and ``+``.
        common: Options of ``train`` that all arms share.
        scales: Name -> more common options, for a study that exists in several sizes; one of them is then named to
            ``run_study``.
        seeds: One training run an arm and seed.
        pairs: ``(arm, reference)``: which arms are compared, seed by seed.
        ablations: Arms that run only when they are named.
        measure: ``measure(run, cell) -> dict`` of JSON types, called once after each training run. Numbers at its top
            level, and every ``"accuracy"`` further inside, are averaged and compared.
        name: A short name that each result carries; results of another study in the same folder are then refused.

    Raises:
        ValueError: No arms or seeds, a seed twice, an option that ``train`` does not have or a value out of its range,
            a pair that names an unknown arm, or a name that cannot be a file name. The message names the nearest right
            one.
        TypeError: An arm that is not an ``Arm``, a seed that is not a whole number, or a value of another kind.
    """

    question: str
    arms: Mapping[str, Arm]
    common: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    pairs: Sequence[tuple[str, str]] = ()
    ablations: Mapping[str, Arm] = field(default_factory=dict)
    measure: Measure = field(default_factory=RobustAccuracy)
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("a study needs at least one arm")
        if twice := sorted(self.arms.keys() & self.ablations.keys()):
            raise ValueError(f"{twice[0]!r} is both an arm and an ablation")
        _check_seeds(self.seeds)
        for name, arm in self.every_arm.items():
            if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
                raise ValueError(f"{name!r} cannot name an arm: it becomes a file name of letters, digits, _ . + -")
            if not isinstance(arm, Arm):
                raise TypeError(f"arm {name!r} must be an Arm, got {type(arm).__name__}")
            _check_options(f"arm {name!r}", arm.options)
        _check_options("common", self.common)
        for name, options in self.scales.items():
            _check_options(f"scale {name!r}", options)
        for scale in self.scales or (None,):
            for cell in self.cells(scale, arms=list(self.every_arm)):
                _check_values(cell)
        for pair in self.pairs:
            arm, reference = pair
            check_name("arm of a pair", arm, self.every_arm)
            check_name("arm of a pair", reference, self.every_arm)
            if arm == reference:
                raise ValueError(f"a pair compares {arm!r} with itself")
        if not callable(self.measure):
            raise TypeError(f"measure must be a function of a run and a cell, got {type(self.measure).__name__}")

    @property
    def every_arm(self) -> dict[str, Arm]:
        """The arms and the ablations."""
        return {**self.arms, **self.ablations}

    def cells(
        self, scale: str | None = None, arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> list[Cell]:
        """Return the training runs, all arms of the first seed first, so that an unfinished study is already paired.

        Args:
            scale: One of ``scales``; None for a study that has none.
            arms: Only these, in this order; ablations may be among them. All but the ablations by default.
            seeds: Instead of the study's own.

        Raises:
            ValueError: An unknown arm or scale, no scale where the study has some, no seeds, or a seed twice.
        """
        if self.scales and scale is None:
            raise ValueError(f"this study exists at several scales; name one of {', '.join(self.scales)}")
        if scale is not None:
            check_name("scale", scale, self.scales)
        arms = list(self.arms) if arms is None else list(arms)
        for name in arms:
            check_name("arm", name, self.every_arm)
        if not arms or len(set(arms)) < len(arms):
            raise ValueError(f"arms must name at least one arm, each once, got {arms}")
        common = {**self.common, **self.scales.get(scale, {})}
        return [
            Cell(name, int(seed), scale, {**common, **self.every_arm[name].options}, seed == self.seeds[0])
            for seed in (self.seeds if seeds is None else _check_seeds(seeds))
            for name in arms
        ]


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    """Refuse options that ``train`` does not have, or that the study itself sets."""
    for name in options:
        if name in ("out", "seed"):
            raise ValueError(f"{where} sets {name!r}, which the study chooses for each cell; see Study.seeds")
        check_name(f"option in {where}:", name, [f.name for f in fields(TrainSettings)])
    try:
        json.dumps(dict(options))
    except TypeError as error:
        raise TypeError(f"the options in {where} must be numbers, texts, lists and dicts: {error}") from error


def _check_values(cell: Cell) -> None:
    try:
        TrainSettings.from_dict(cell.options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"arm {cell.arm!r}: {error}") from error


def _check_seeds(seeds: Sequence[int]) -> Sequence[int]:
    """Return the seeds if there are any, all whole numbers, none twice."""
    if len(seeds) == 0:
        raise ValueError("a study needs at least one seed")
    for seed in seeds:
        check_count("a seed", seed, at_least=0)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed may be given once, got {list(seeds)}")
    return seeds
