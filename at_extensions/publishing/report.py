"""The report of one run, or of several side by side: one HTML page that needs nothing but itself."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from at_extensions.analysis.collapse import CatastrophicOverfitting, catastrophic_overfitting
from at_extensions.analysis.overfitting import FEWEST_EPOCHS, KEY, RobustOverfitting, robust_overfitting
from at_extensions.publishing import figures, plots, sweep_plots
from at_extensions.publishing.measurements import measurements
from at_extensions.publishing.model_info import eps_fraction
from at_extensions.publishing.pages import compact_yaml, render
from at_extensions.publishing.reproduction import evaluate_command, train_command
from at_extensions.publishing.sweeps import SweepPoint, is_sweep, rank_correlations, sweep_point
from at_extensions.runs import RunDirectory, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Run:
    """The contents of the page about one run."""

    label: str
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any] | None
    examples: Mapping[str, Any] | None

    def named(self, part: str) -> str:
        """Name of the run's model, method or data."""
        value = self.config.get(part)
        return str((value.get("name") if isinstance(value, Mapping) else value) or "–")

    @property
    def recipe(self) -> str:
        """The configuration without the versions, as YAML."""
        return compact_yaml({k: v for k, v in self.config.items() if k != "versions"}).strip()

    @property
    def versions(self) -> Mapping[str, Any]:
        """Versions that evaluated, or else that trained."""
        return (self.evaluation or {}).get("versions") or self.config.get("versions") or {}

    @property
    def threat(self) -> str:
        """Norm and radius of the evaluation."""
        return "" if self.evaluation is None else _threat(self.evaluation)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of robust accuracy."""
        return None if self.evaluation is None else plots.interval_of(self.evaluation)

    @property
    def overfitting(self) -> RobustOverfitting | None:
        """Robust overfitting of the run; None after clean training, a collapse, or too few epochs under attack."""
        measured = [row for row in self.history if isinstance(row.get(KEY), (int, float))]
        told = self.named("method") != "standard" and len(measured) >= FEWEST_EPOCHS and self.collapse is None
        return robust_overfitting(measured) if told else None

    @property
    def collapse(self) -> CatastrophicOverfitting | None:
        """Catastrophic overfitting of the run; None where no epoch ended collapsed."""
        if self.named("method") == "standard" or not any(isinstance(r.get(KEY), (int, float)) for r in self.history):
            return None
        found = catastrophic_overfitting(self.history)
        return found if found.collapsed else None

    @property
    def events(self) -> list[Mapping[str, Any]]:
        """What observers did, in order: warnings, rollbacks, stops."""
        return [event for row in self.history for event in row.get("events", [])]

    @property
    def minutes(self) -> float | None:
        """Time of training, where it was measured."""
        seconds = [row["seconds"] for row in self.history if row.get("seconds") is not None]
        return sum(seconds) / 60 if seconds else None


def write_report(
    runs: Sequence[RunDirectory],
    out: str | Path,
    *,
    title: str = "Robustness report",
    command: str | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write one self-contained HTML page on the runs: headline numbers, figures, configuration, how to reproduce.

    The page states which parts a run lacks: an evaluation, examples, metrics.

    Args:
        runs: The runs, in the order to show them.
        out: The file to write, or a folder to write ``report.html`` into.
        title: Heading of the page.
        command: The command that made the runs; the page shows ``train`` and ``evaluate`` for each if None.
        class_names: Names to show in place of class numbers.

    Returns:
        The path written.

    Raises:
        ValueError: No runs were given.
        FileNotFoundError: A run directory does not exist.
    """
    if not runs:
        raise ValueError("a report needs at least one run directory")
    for run in runs:
        if not Path(run.path).is_dir():
            raise FileNotFoundError(f"no run directory {run.path}; train first: at-extensions train {run.path}")
    pages = _read(runs)
    points = _sweep(pages)
    evaluated = {p.label: p.evaluation for p in pages if p.evaluation is not None}
    page = render(
        "report.html",
        title=title,
        written=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        runs=pages,
        headline=_headline(evaluated),
        figures=_figures(pages, evaluated, points, class_names),
        correlations=rank_correlations(points),
        sweep_accuracy=_sweep_accuracy(pages)[0],
        triples=_triples(pages, class_names),
        measured=[found for i, (r, p) in enumerate(zip(runs, pages)) for found in measurements(r.path, p.label, i)],
        command=command or "\n".join(_commands(pages)),
        attacks=plots.attacks_of({label: e for label, e in evaluated.items() if e.get("after_attack")}),
        has_groups=any(e.get("groups") for e in evaluated.values()),
        standard=all(e.get("version") == "standard" for e in evaluated.values()),
    )
    out = Path(out)
    return write_text(out / "report.html" if out.suffix.lower() not in (".html", ".htm") else out, page)


def _read(runs: Sequence[RunDirectory]) -> list[_Run]:
    names = [Path(run.path).resolve().name for run in runs]
    if len(set(names)) < len(names):  # the same name in different folders
        names = ["/".join(Path(run.path).resolve().parts[-2:]) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{i}. {name}" for i, name in enumerate(names, 1)]
    return [_Run(n, r.config(), r.metrics(), r.evaluation(), r.examples()) for n, r in zip(names, runs)]


def _commands(pages: Sequence[_Run]) -> list[str]:
    """Return the commands that train and evaluate each run again."""
    lines = []
    for page in pages:
        trained = train_command(page.config, page.label)
        lines.append(trained or f"# {page.label}: config.yaml does not say how it was trained")
        if page.evaluation is not None:
            trained_on = (page.config.get("data") or {}).get("name")
            lines.append(evaluate_command(page.evaluation, page.label, trained_on))
    return lines


def _threat(evaluation: Mapping[str, Any]) -> str:
    return f"{evaluation['norm']}, ε = {eps_fraction(evaluation['eps'], evaluation['norm'])}"


def _attacks(evaluated: Iterable[Mapping[str, Any]]) -> str:
    """Return the name of what the runs were attacked with."""
    versions = {e.get("version", "standard") for e in evaluated}
    return "PGD-50 with ten restarts" if versions == {"pgd-50-10"} else "AutoAttack"


def _headline(evaluated: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the result in one sentence."""
    if not evaluated:
        return "No run has been evaluated yet."
    if len({_threat(e) for e in evaluated.values()}) > 1:
        return "The runs were evaluated under different threat models; compare them with care."
    ranked = sorted(evaluated, key=lambda label: evaluated[label]["robust_accuracy"], reverse=True)
    parts = [f"{name} keeps {100 * evaluated[name]['robust_accuracy']:.1f} %" for name in ranked]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
    return f"Under {_attacks(evaluated.values())} ({_threat(evaluated[ranked[0]])}), {listed} of the test images right."


def _sweep(pages: Sequence[_Run]) -> list[SweepPoint]:
    """The runs as points of a sweep over lr / batch size; none if they are not one."""
    _, accuracies = _sweep_accuracy(pages)
    points = [
        sweep_point(page.label, page.config.get("training") or {}, robust, _last(page.history, "train_accuracy"))
        for page, robust in zip(pages, accuracies)
        if robust is not None
    ]
    found = [point for point in points if point is not None]
    return found if is_sweep(found) else []


def _sweep_accuracy(pages: Sequence[_Run]) -> tuple[str, list[float | None]]:
    """Return the measure that all runs share, and its values: AutoAttack if all met the same, or validation."""
    attacked = [page.evaluation for page in pages if page.evaluation is not None]
    if len(attacked) == len(pages) and len({(_threat(e), e["n_examples"]) for e in attacked}) == 1:
        return f"robust accuracy ({_attacks(attacked)})", [e["robust_accuracy"] for e in attacked]
    return "robust accuracy (validation, last epoch)", [_last(p.history, "val_robust_accuracy") for p in pages]


def _last(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the value of the last epoch."""
    return history[-1].get(key) if history else None


def _figures(
    pages: Sequence[_Run],
    evaluated: Mapping[str, Any],
    points: Sequence[SweepPoint],
    class_names: Sequence[str] | None,
) -> dict[str, str]:
    """SVG by section, for those that have something to show."""
    drawn: dict[str, tuple[Figure, str]] = {}
    histories = {p.label: p.history for p in pages if p.history}
    attacked = {label: e for label, e in evaluated.items() if e.get("after_attack")}
    by_class = {label: e for label, e in evaluated.items() if e.get("per_class")}
    if histories:
        overfitting = {p.label: p.overfitting for p in pages if p.overfitting is not None}
        curves = plots.training_curves(histories, overfitting)
        drawn["curves"] = curves, "Training curves: accuracy and loss by epoch"
    if points:
        figure = sweep_plots.sweep(points, _sweep_accuracy(pages)[0])
        drawn["sweep"] = figure, "Robust accuracy against learning rate over batch size, nominal and effective"
    if evaluated:
        drawn["bars"] = plots.accuracy_bars(evaluated), "Clean and robust accuracy of each run"
    if attacked:
        drawn["attacks"] = plots.after_attack(attacked), "Accuracy left after each attack"
    if by_class:
        drawn["classes"] = plots.per_class_bars(by_class, class_names), "Clean and robust accuracy of each class"
    return {name: figures.to_svg(figure, name, text) for name, (figure, text) in drawn.items()}


def _triples(pages: Sequence[_Run], class_names: Sequence[str] | None) -> list[dict[str, str]]:
    return [
        {
            "label": page.label,
            "svg": figures.to_svg(
                plots.triples(page.examples, class_names=class_names),
                f"triples-{i}",
                f"Images, perturbations and adversarial images of {page.label}, with predictions",
            ),
        }
        for i, page in enumerate(pages)
        if page.examples is not None and len(page.examples["images"])
    ]
