"""Evaluation of a run or of a user's own checkpoint: AutoAttack on a test split, written into the run directory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from at_extensions.checks import check_device
from at_extensions.commands.own_model import adopt
from at_extensions.data import is_long_tailed, load_test
from at_extensions.data.split import LabelledSplit
from at_extensions.evaluation.autoattack import evaluate
from at_extensions.evaluation.precision import arithmetic
from at_extensions.evaluation.report import RobustnessReport
from at_extensions.models import check_fits
from at_extensions.named_models import open_run
from at_extensions.processes import is_main, own_device
from at_extensions.publishing import write_report, write_run_info
from at_extensions.publishing.naming import data_name
from at_extensions.runs import RunDirectory, check_writable
from at_extensions.settings import EvaluateSettings, OwnModelSettings

_SUITE = ("norm", "version", "attacks", "seed", "batch_size", "n_examples", "precision", "compile")


def evaluate_run(run: str | Path, settings: EvaluateSettings | None = None, **options: Any) -> RobustnessReport:
    """Attack a run's model with AutoAttack on its test split; write evaluation.json and a few examples into the run.

    With a model or weights, the run is made of that checkpoint first. The run directory of a factory holds its source,
    which each later command on the run executes. Under torchrun the batches are dealt over the processes, and the first
    one writes. Stopped and started again, it goes on where it was.

    Args:
        run: A run directory; the one to make, where ``model`` or ``weights`` is given.
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``EvaluateSettings``), such as ``eps="8/255", n_examples=1000``.

    Returns:
        The report, as evaluation.json holds it.

    Raises:
        FileExistsError: The directory holds another run than the checkpoint's.
        FileNotFoundError: No such run, checkpoint or data set.
        OSError: The run directory cannot be written.
        TypeError, ValueError: Settings that cannot be right.
    """
    settings = EvaluateSettings.of(settings, options)
    device = own_device() if settings.device is None else check_device(settings.device)
    directory = RunDirectory(run)
    own = settings.model is not None or settings.weights is not None
    config = directory.config()
    eps = _check_given(directory, settings, own, config)
    data, test = _test_split(settings, {} if own else config["data"])
    if own:
        chosen = {f.name: getattr(settings, f.name) for f in fields(OwnModelSettings)}
        adopt(directory, test, data, progress=settings.progress, **chosen)
    model = open_run(directory, settings.checkpoint).model.to(device)
    check_fits(model, test[0][0], data["name"])
    check_writable(directory.path)
    class_counts = None if own else config["data"].get("class_counts")
    suite = {key: getattr(settings, key) for key in _SUITE} | {"eps": eps}
    path = directory.published_weights() if settings.checkpoint is None else directory.weights(settings.checkpoint)
    report = evaluate(
        model,
        test,
        state_dir=directory.path / "evaluation_state" / _digest(path, data, suite, device),
        class_counts=class_counts if class_counts and is_long_tailed(class_counts) else None,
        keep_examples=settings.keep_examples,
        progress=settings.progress,
        **suite,
    )
    report = replace(report, data_name=data_name(data))
    if is_main():
        directory.write_evaluation(report.to_dict(), report.examples and report.examples.to_dict())
    return report


def _check_given(run: RunDirectory, settings: EvaluateSettings, own: bool, config: Mapping[str, Any]) -> float:
    """Return the radius; refuse an evaluation without data, radius or run before anything long is read."""
    if own and settings.data is None:
        raise ValueError("say which test data to evaluate a checkpoint on: --data cifar10, npz:PATH or folder:PATH")
    alone = {f.name for f in fields(OwnModelSettings) if getattr(settings, f.name) is not None}
    if not own and alone:
        raise ValueError(
            f"{', '.join(sorted(alone))} belong to a checkpoint of your own; give --model and --weights too"
        )
    if not own and not config:
        run.published_weights()  # its error says that this is no run directory
        raise FileNotFoundError(
            f"{run.path} has no config.yaml; evaluate its weights in a directory of their own: "
            "at-extensions evaluate DIR --model NAME --weights FILE"
        )
    trained = None if own else (config.get("method") or {}).get("eps")
    if settings.eps is None and trained is None:
        raise ValueError("say the radius of the attack: --eps 8/255")
    return EvaluateSettings(eps=trained).eps if settings.eps is None else settings.eps


def _test_split(settings: EvaluateSettings, recorded: Mapping[str, Any]) -> tuple[dict[str, Any], LabelledSplit]:
    """Return the description of the test data, as ``config.yaml`` holds it, and the data."""
    chosen = {key: getattr(settings, key) for key in ("image_size", "num_classes", "severity")}
    if settings.data is None:
        chosen = {key: recorded.get(key) if value is None else value for key, value in chosen.items()}
    if settings.data is None and recorded.get("inject_beta") is not None:
        raise ValueError(
            "this run's images have injected features and leave [0, 1], in which AutoAttack searches; give --data "
            f"{recorded['name']} to evaluate it on the images without them"
        )
    data = {"name": settings.data or recorded["name"], "root": settings.root or recorded.get("root")}
    data |= {key: value for key, value in chosen.items() if value is not None}
    return data, load_test(data["name"], root=data["root"], **chosen)


def write_results(run: str | Path) -> tuple[Path, Path]:
    """Write an evaluated run's RobustBench JSON and its page into its directory; return both paths.

    Raises:
        FileNotFoundError: The run has not been evaluated.
    """
    return write_run_info(run), write_report([RunDirectory(run)], Path(run) / "report.html")


def _digest(weights: Path, data: dict, suite: dict, device: torch.device) -> str:
    """Return a short name for an evaluation: other weights, settings or arithmetic keep a state of their own."""
    digest = hashlib.sha256(weights.read_bytes())
    digest.update(repr((sorted(data.items()), sorted(suite.items()), arithmetic(device))).encode())
    return digest.hexdigest()[:16]
