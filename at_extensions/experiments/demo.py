"""The demonstration: clean and adversarial training on real scanned digits, attacked and written up."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from at_extensions.commands.evaluate import evaluate_run
from at_extensions.commands.train import train
from at_extensions.publishing import write_report, write_run_info
from at_extensions.runs import RunDirectory
from at_extensions.settings import DemoSettings, TrainSettings

EPS = 0.2  # at 8/255 even a CNN of clean training keeps 93 % of these digits; at 0.2 it keeps next to none
SHOWN = 8


def demo(settings: DemoSettings | None = None, **options: Any) -> Path:
    """Train a small CNN on scikit-learn's digits with and without PGD-AT, attack both with AutoAttack, and report.

    Takes minutes on two CPU cores. Run again, it goes on where it stopped.

    Args:
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``DemoSettings``).

    Returns:
        Path of the report.
    """
    settings = DemoSettings.of(settings, options)
    out, shared = Path(settings.out), {"seed": settings.seed, "progress": settings.progress}
    common = {"data": "digits", "model": "small_cnn", "batch_size": 64, "augment": "crop", "epochs": settings.epochs}
    runs = []
    for name, options in (
        ("clean", {"method": "standard"}),
        ("pgd", {"method": "pgd", "alpha": EPS / 4, "steps": 10}),
    ):
        run = train(out / name, TrainSettings(eps=EPS, **options, **common, **shared))
        evaluate_run(run.path, eps=EPS, keep_examples=10_000, **shared)
        write_run_info(run)
        runs.append(run)
    _show_the_same(runs)
    return write_report(
        runs,
        out / "report.html",
        title="Clean and adversarial training on scanned digits",
        command=shlex.join(["at-extensions", "demo", *settings.arguments()]),
    )


def _show_the_same(runs: Sequence[RunDirectory]) -> None:
    """Keep a few examples of the same images in every run; those that all the attacks broke, where there are some."""
    kept = [run.examples() or {"images": ()} for run in runs]
    rows = [{image.numpy().tobytes(): row for row, image in enumerate(found["images"])} for found in kept]
    common = [image for image in rows[0] if all(image in other for other in rows)][:SHOWN]
    for run, found, at in zip(runs, kept, rows):
        chosen = [at[image] for image in common or list(at)[:SHOWN]]
        if chosen:
            run.write_evaluation(run.evaluation(), {name: values[chosen] for name, values in found.items()})
