"""The evaluation of a trained run: its published weights on its own test split, written into its directory."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from at_extensions.checks import check_device
from at_extensions.data import is_long_tailed, load_dataset
from at_extensions.evaluation.autoattack import evaluate
from at_extensions.evaluation.report import RobustnessReport
from at_extensions.models import check_fits, load_model
from at_extensions.processes import is_main, own_device
from at_extensions.publishing import write_report, write_run_info
from at_extensions.runs import RunDirectory, check_writable
from at_extensions.settings import EvaluateSettings

_SUITE = ("norm", "version", "attacks", "seed", "batch_size", "n_examples", "precision", "compile")


def evaluate_run(run: str | Path, settings: EvaluateSettings | None = None, **options: Any) -> RobustnessReport:
    """Attack a run's model with AutoAttack on its test split; write evaluation.json and a few examples into the run.

    Under torchrun the batches are dealt over the processes, and the first one writes. Stopped and started again, it
    goes on where it was.

    Args:
        run: A run directory.
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``EvaluateSettings``), such as ``eps="8/255", n_examples=1000``.

    Returns:
        The report, as evaluation.json holds it.

    Raises:
        FileNotFoundError: No such run, checkpoint or data set.
        OSError: The run directory cannot be written.
        TypeError, ValueError: Settings that cannot be right.
    """
    settings = EvaluateSettings.of(settings, options)
    device = own_device() if settings.device is None else check_device(settings.device)
    directory = RunDirectory(run)
    config = directory.config()
    path = directory.published_weights() if settings.checkpoint is None else directory.weights(settings.checkpoint)
    model = load_model(path).to(device)
    trained = config["data"]
    class_counts = trained.get("class_counts")
    name = settings.data or trained["name"]
    splits = load_dataset(
        name,
        root=settings.root or trained.get("root"),
        val_fraction=0.0,
        image_size=trained.get("image_size"),
    )
    check_fits(model, splits.test[0][0], name)
    check_writable(directory.path)
    suite = {key: getattr(settings, key) for key in _SUITE}
    suite["eps"] = EvaluateSettings(eps=config["method"]["eps"]).eps if settings.eps is None else settings.eps
    report = evaluate(
        model,
        splits.test,
        state_dir=directory.path / "evaluation_state" / _digest(path, settings.data, suite),
        class_counts=class_counts if class_counts and is_long_tailed(class_counts) else None,
        keep_examples=settings.keep_examples,
        progress=settings.progress,
        **suite,
    )
    report = replace(report, data_name=name)
    if is_main():
        directory.write_evaluation(report.to_dict(), report.examples and report.examples.to_dict())
    return report


def write_results(run: str | Path) -> tuple[Path, Path]:
    """Write an evaluated run's RobustBench JSON and its page into its directory; return both paths.

    Raises:
        FileNotFoundError: The run has not been evaluated.
    """
    return write_run_info(run), write_report([RunDirectory(run)], Path(run) / "report.html")


def _digest(weights: Path, data: str | None, suite: dict) -> str:
    """Return a short name for an evaluation, so that one with other weights or settings keeps a state of its own."""
    digest = hashlib.sha256(weights.read_bytes())
    digest.update(repr((data, sorted(suite.items()))).encode())
    return digest.hexdigest()[:16]
