"""Studies: arms that are trained with several seeds, measured, and compared seed by seed.

A study grows over days and machines: each finished run is one JSON file, finished runs are skipped, an interrupted one
goes on where it was, and several processes may work on one study. The page docs/study.md shows how to plan one.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from at_extensions.checks import check_count, check_name
from at_extensions.commands.train import train
from at_extensions.experiments.machine import machine
from at_extensions.experiments.robust_accuracy import RobustAccuracy
from at_extensions.experiments.summary import StudySummary, numbers, read_results, summarise
from at_extensions.processes import launched, own_device
from at_extensions.runs import RunDirectory, write_json, write_text

logger = logging.getLogger(__name__)

LOCAL = ("data", "root", "progress")
"""Options of ``train`` that may differ between the machines of one study."""

_TAKEN = {"study", "question", "arm", "seed", "scale", "command", "options", "epochs", "training_seconds", "machine",
          "wall_seconds"}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One alternative that a study compares.

    Attributes:
        options: Options of ``at_extensions.train`` beside those that all arms share, which they override.
        description: A few words for a reader.
    """

    options: Mapping[str, Any]
    description: str = ""


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        arm: Name of the arm.
        seed: Seed of initial weights, order, augmentation and attacks.
        scale: Name of the scale, or None.
        options: All options of ``train`` but the seed and those of the machine.
        first_seed: Whether the seed is the study's first: costly measurements may be limited to it.
    """

    arm: str
    seed: int
    scale: str | None
    options: dict[str, Any]
    first_seed: bool

    @property
    def name(self) -> str:
        """The name of the result file without its suffix."""
        return f"{self.arm}-seed{self.seed}"


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
        ValueError: No arms or seeds, a seed twice, an option that ``train`` does not have, a pair that names an
            unknown arm, or a name that cannot be a file name. The message names the nearest right one.
        TypeError: An arm that is not an ``Arm``, or a seed that is not a whole number.
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


@dataclass(frozen=True)
class StudyProgress:
    """What became of the cells of a study.

    Attributes:
        finished: Result files, in the order of the cells; those from earlier calls are among them.
        failed: Cell -> its error in one line. The traceback is in ``<cell>.failed.txt`` among the results; the next
            call tries the cell again.
        busy: Cells that another process is working on.
        summary: Means and paired differences over all results in the folder; None without any.
    """

    finished: list[Path]
    failed: dict[str, str]
    busy: list[str]
    summary: StudySummary | None

    def __repr__(self) -> str:
        counts = f"{len(self.finished)} finished, {len(self.failed)} failed, {len(self.busy)} busy elsewhere"
        lines = [f"StudyProgress: {counts}", *(f"  failed {name}: {error}" for name, error in self.failed.items())]
        return "\n".join([*lines, *([] if self.summary is None else [repr(self.summary)])])


def run_study(
    study: Study,
    results: str | Path,
    *,
    runs: str | Path | None = None,
    scale: str | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    local: Mapping[str, Any] | None = None,
    threads: int | None = None,
    command: str | None = None,
) -> StudyProgress:
    """Train and measure the cells of a study that have no result yet; write one JSON a cell, and ``summary.json``.

    A cell that fails leaves the others: a warning says so, and the next call tries it again. Several processes, also on
    several machines that share the folders, may run one study at the same time: each takes the cells that no other is
    working on. The operating system frees the cell of a process that died.

    Args:
        study: What to run.
        results: Folder of the results, one file ``<arm>-seed<seed>.json`` a cell, small enough to commit.
        runs: Folder of the run directories (checkpoints, metrics); ``runs`` in ``results`` by default.
        scale: One of the study's scales.
        arms: Only these arms; ablations may be among them.
        seeds: Instead of the study's own.
        local: ``data``, ``root`` and ``progress`` of ``train`` on this machine. They are not recorded, and results from
            different places may be side by side.
        threads: CPU threads of this process; unchanged by default, and restored afterwards.
        command: The command that started this, for the record; ``{arm}`` and ``{seed}`` are filled in.

    Raises:
        ValueError: An unknown arm, scale or local option; no seeds or a seed twice; a result file that is damaged, of
            another study, or measured with other options than the study now has; or a start under torchrun.
    """
    if launched():
        raise ValueError("a study trains each cell in one process; start it without torchrun, once for each GPU")
    local = dict(local or {})
    for name in local:
        check_name("local option", name, LOCAL)
    cells = study.cells(scale, arms, seeds)
    results = Path(results)
    runs = results / "runs" if runs is None else Path(runs)
    before = {f"{row['arm']}-seed{row['seed']}": row["options"] for row in read_results(study, results)}
    for cell in cells:
        _check_unchanged(cell, before.get(cell.name, cell.options), results)
    finished, failed, busy = [], {}, []
    with _threads(threads):
        for cell in cells:
            out = results / f"{cell.name}.json"
            with _claim(results / ".claims" / f"{cell.name}.lock") as ours:
                if not ours:
                    busy.append(cell.name)
                    continue
                error = None if out.exists() else _try(study, cell, out, runs, local, command)
            if error is None:
                finished.append(out)
                logger.info("%s", out)
            else:
                failed[cell.name] = error
            _summarise(study, results)
    return StudyProgress(finished, failed, busy, _summarise(study, results))


def _try(study: Study, cell: Cell, out: Path, runs: Path, local: dict, command: str | None) -> str | None:
    """Run a cell and write its result; return the error in one line, with the traceback beside the results."""
    failure = out.with_name(f"{cell.name}.failed.txt")
    try:
        write_json(out, _run(study, cell, runs / cell.name, local, command))
    except Exception as error:  # an arm's own crash must not take the other arms with it
        write_text(failure, traceback.format_exc())
        message = f"{type(error).__name__}: {error}"
        warnings.warn(f"{cell.name} failed ({message}); the other cells go on, see {failure}", stacklevel=3)
        return message
    failure.unlink(missing_ok=True)
    return None


def _run(study: Study, cell: Cell, path: Path, local: dict, command: str | None) -> dict[str, Any]:
    """Train and measure one cell and return its result."""
    started = time.time()
    run = train(path, seed=cell.seed, **{**cell.options, **local})
    epochs = run.metrics()
    result = {
        **({} if study.name is None else {"study": study.name}),
        "question": study.question,
        "arm": cell.arm,
        "seed": cell.seed,
        "scale": cell.scale,
        "command": command and command.format(arm=cell.arm, seed=cell.seed),
        "options": cell.options,
        "epochs": epochs,
        "training_seconds": sum(row["seconds"] + row.get("val_seconds", 0.0) for row in epochs),
    }
    result |= _check_measured(study.measure(run, cell))
    return result | {"machine": machine(own_device()), "wall_seconds": time.time() - started}


def _check_measured(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a measurement if it can be written, averaged and compared."""
    if not isinstance(measured, dict):
        raise TypeError(f"measure must return a dict, got {type(measured).__name__}")
    if taken := sorted(measured.keys() & _TAKEN):
        raise ValueError(f"measure returned {taken[0]!r}, which the study itself records; give it another name")
    try:
        json.dumps(measured)
    except TypeError as error:
        raise TypeError(f"measure must return numbers, texts, lists and dicts: {error}") from error
    for name, value in numbers(measured).items():
        if not math.isfinite(value):
            raise ValueError(f"measure returned {value} for {name!r}")
    return measured


def _check_unchanged(cell: Cell, before: dict[str, Any], results: Path) -> None:
    """Refuse a result that was measured with other options than the study gives its cell now."""
    now = json.loads(json.dumps(cell.options))
    before = json.loads(json.dumps(before))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{results / cell.name}.json was measured with {name} {before.get(name)!r}, the study now has "
                f"{now.get(name)!r}; move the result away, or give the changed arm another name"
            )


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    """Refuse options that ``train`` does not have, or that the study itself sets."""
    known = inspect.signature(train).parameters
    for name in options:
        if name in ("out", "seed"):
            raise ValueError(f"{where} sets {name!r}, which the study chooses for each cell; see Study.seeds")
        check_name(f"option in {where}:", name, known)
    try:
        json.dumps(dict(options))
    except TypeError as error:
        raise TypeError(f"the options in {where} must be numbers, texts, lists and dicts: {error}") from error


def _check_seeds(seeds: Sequence[int]) -> Sequence[int]:
    """Return the seeds if there are any, all whole numbers, none twice."""
    if len(seeds) == 0:
        raise ValueError("a study needs at least one seed")
    for seed in seeds:
        check_count("a seed", seed, at_least=0)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed may be given once, got {list(seeds)}")
    return seeds


@contextmanager
def _claim(path: Path, *, blocking: bool = False) -> Iterator[bool]:
    """Hold a lock file in the context and yield whether it is held; the system frees it when this process dies."""
    from filelock import FileLock, Timeout

    if not path.parent.is_dir():
        write_text(path.parent / ".gitignore", "*\n")
    lock = FileLock(path, timeout=-1 if blocking else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _summarise(study: Study, results: Path) -> StudySummary | None:
    """Write ``summary.json`` if there is a result; one process at a time, so that the last one has read all results."""
    with _claim(results / ".claims" / "summary.lock", blocking=True):
        if not any(results.glob("*-seed*.json")):
            return None
        summary = summarise(study, results)
        summary.save(results / "summary.json")
    return summary


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(check_count("threads", threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)
