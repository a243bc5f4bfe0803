"""The results of a study, read from its files: means of each arm, paired differences, rank correlations of a sweep."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from at_extensions.experiments.study import Study
from at_extensions.intervals import PairedDifference, paired_interval
from at_extensions.publishing import figures, sweep_plots
from at_extensions.publishing.sweeps import (
    RankCorrelation,
    SweepPoint,
    is_sweep,
    rank_correlations,
    sweep_point,
)
from at_extensions.runs import write_json

_OWN = {"seed", "training_seconds", "wall_seconds"}  # numbers of a result that its measurement did not give


@dataclass(frozen=True)
class StudySummary:
    """What a study has found so far.

    Attributes:
        question: The study's.
        values: Arm -> name of a number -> seed -> value.
        differences: ``"<arm> - <reference>"`` -> name of a number -> difference with interval, for the study's pairs.
        rank_correlations: Of robust accuracy with lr / batch size, where the arms are a sweep of the learning rate.
        failed: Cells whose last attempt failed, and that no mean contains.
        points: The runs of the sweep.
    """

    question: str
    values: dict[str, dict[str, dict[int, float]]]
    differences: dict[str, dict[str, PairedDifference]]
    rank_correlations: list[RankCorrelation] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    points: list[SweepPoint] = field(default_factory=list)

    @property
    def means(self) -> dict[str, dict[str, float]]:
        """Arm -> name of a number -> mean over the seeds."""
        return {
            arm: {name: statistics.fmean(values.values()) for name, values in of_arm.items()}
            for arm, of_arm in self.values.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON types, as ``summary.json`` holds it."""
        summary: dict[str, Any] = {
            "question": self.question,
            "means": self.means,
            "differences": {
                pair: {name: difference.to_dict() for name, difference in of_pair.items()}
                for pair, of_pair in self.differences.items()
            },
        }
        if self.rank_correlations:
            summary["rank_correlations"] = [asdict(row) for row in self.rank_correlations]
        return summary | ({"failed": self.failed} if self.failed else {})

    def save(self, path: str | Path) -> Path:
        """Write the summary as JSON, and ``lr_batch.png`` beside it where the arms are a sweep; return the path."""
        if self.rank_correlations:
            figure = sweep_plots.sweep(self.points, "PGD-20 accuracy, last epoch")
            figures.save_png(figure, Path(path).with_name("lr_batch.png"))
        return write_json(path, self.to_dict())

    def __repr__(self) -> str:
        lines = [f"StudySummary: {self.question}"]
        for arm, of_arm in self.values.items():
            seeds = sorted({seed for values in of_arm.values() for seed in values})
            lines.append(f"  {arm} (seeds {', '.join(map(str, seeds))})")
            lines += [f"    {name:<24}{mean:8.4f}" for name, mean in self.means[arm].items()]
        for pair, of_pair in self.differences.items():
            lines.append(f"  {pair}")
            lines += [f"    {name:<24}{repr(d).partition(': ')[2]}" for name, d in of_pair.items()]
        return "\n".join([*lines, *(f"  ! {name} failed; no mean contains it" for name in self.failed)])


def summarise(study: Study, results: str | Path) -> StudySummary:
    """Read the results of a study and return each arm's means and the differences of its pairs, over the seeds so far.

    Every number in a result counts that is at the top level of the measurement, or is called ``accuracy`` further
    inside; the latter are named by their place, such as ``last/pgd20``, and bring those of head, medium and tail
    classes with them. Nothing is written.

    Args:
        study: Its pairs and its question.
        results: The folder that ``run_study`` wrote.

    Raises:
        FileNotFoundError: No such folder, or no result in it.
        ValueError: A result file that is damaged or of another study.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    rows = read_results(study, results)
    if not rows:
        raise FileNotFoundError(f"{results} holds no result of a study (<arm>-seed<seed>.json)")
    for row in rows:
        for name, value in numbers({k: v for k, v in row.items() if k not in _OWN}).items():
            found.setdefault(row["arm"], {}).setdefault(name, {})[row["seed"]] = value
    differences = {
        f"{arm} - {reference}": {
            name: paired_interval(values, found[reference].get(name, {})) for name, values in found[arm].items()
        }
        for arm, reference in study.pairs
        if arm in found and reference in found
    }
    points = _sweep_points(rows)
    failed = sorted(path.name.removesuffix(".failed.txt") for path in Path(results).glob("*-seed*.failed.txt"))
    correlations = rank_correlations(points) if is_sweep(points) else []
    return StudySummary(study.question, found, differences, correlations, failed, points)


def read_results(study: Study, results: str | Path, pattern: str = "*-seed*.json") -> list[dict[str, Any]]:
    """Return the results in a folder in the order of their names.

    Raises:
        ValueError: A file that is damaged, not a result, misnamed, or of another study.
    """
    rows = []
    for path in sorted(Path(results).glob(pattern)):
        again = "move it away, and the next run of the study measures it anew"
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}); {again}") from error
        if not isinstance(row, dict) or not {"arm", "seed", "options"} <= row.keys():
            raise ValueError(f"{path} is not the result of a study: it lacks arm, seed or options; {again}")
        if path.name != f"{row['arm']}-seed{row['seed']}.json":
            raise ValueError(f"{path} holds the result of arm {row['arm']!r} with seed {row['seed']}; {again}")
        if study.name is not None and row.get("study", study.name) != study.name:
            raise ValueError(f"{path} belongs to the study {row['study']!r}, not to {study.name!r}")
        rows.append(row)
    return rows


def numbers(measured: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a measurement that are averaged and compared, in the order of their names."""
    plain = {name: float(value) for name, value in measured.items() if _is_number(value)}
    return dict(sorted({**plain, **dict(_accuracies(measured, ""))}.items()))


def _accuracies(measured: Mapping[str, Any], place: str) -> Iterator[tuple[str, float]]:
    for name, inner in measured.items():
        if not isinstance(inner, Mapping):
            continue
        if _is_number(inner.get("accuracy")):
            yield place + name, float(inner["accuracy"])
            for group, value in (inner.get("groups") or {}).items():
                if _is_number(value):
                    yield f"{place}{name}/{group}", float(value)
        yield from _accuracies(inner, f"{place}{name}/")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _sweep_points(rows: list[dict[str, Any]]) -> list[SweepPoint]:
    """Return the runs that choose optimiser and learning rate, and whose last epoch met PGD-20."""
    points = [
        sweep_point(
            f"{row['arm']}-seed{row['seed']}",
            {"batch_size": 128, "momentum": 0.9} | row["options"],
            row["last"]["pgd20"]["accuracy"],
            row["epochs"][-1]["train_accuracy"],
        )
        for row in rows
        if "lr" in row["options"] and "optimizer" in row["options"] and _has_pgd20(row)
    ]
    return [point for point in points if point is not None]


def _has_pgd20(row: dict[str, Any]) -> bool:
    last = row.get("last")
    return isinstance(last, Mapping) and isinstance(last.get("pgd20"), Mapping) and "accuracy" in last["pgd20"]
