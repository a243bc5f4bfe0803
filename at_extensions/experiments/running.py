"""Running a study: train and measure each cell once, in one process or in several that share the work.

A study grows over days and machines: each finished cell is one JSON file and is skipped, an interrupted one resumes,
and a crash leaves the others.
"""

from __future__ import annotations

import json
import logging
import math
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from at_extensions.checks import check_count, check_name
from at_extensions.commands.train import train
from at_extensions.experiments.cell import Cell
from at_extensions.experiments.machine import machine
from at_extensions.experiments.study import Study
from at_extensions.experiments.summary import StudySummary, numbers, read_results, summarise
from at_extensions.processes import launched, own_device
from at_extensions.runs import write_json, write_text

logger = logging.getLogger(__name__)

LOCAL = ("data", "root", "progress")
"""Settings of ``train`` that may differ between the machines of one study."""

_TAKEN = {"study", "question", "arm", "seed", "scale", "command", "options", "epochs", "training_seconds", "machine",
          "wall_seconds"}  # fmt: skip


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
