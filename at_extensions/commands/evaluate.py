"""The evaluation of a trained run: its published weights on its own test split, written into its directory."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from at_extensions.checks import parse_fraction
from at_extensions.data import is_long_tailed, load_dataset
from at_extensions.evaluation.autoattack import evaluate
from at_extensions.evaluation.report import RobustnessReport
from at_extensions.models import load_model
from at_extensions.processes import is_main, own_device
from at_extensions.runs import RunDirectory


def evaluate_run(
    run: str | Path,
    *,
    eps: str | float | None = None,
    norm: str = "Linf",
    version: str = "standard",
    attacks: list[str] | None = None,
    n_examples: int | None = None,
    checkpoint: str | None = None,
    data: str | None = None,
    root: str | None = None,
    batch_size: int | None = None,
    precision: str = "fp32",
    compile: bool = False,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """Attack a run's model with AutoAttack on its test split; write evaluation.json and a few examples into the run.

    Under torchrun the batches are dealt over the processes, and the first one writes.

    Args:
        run: A run directory.
        eps: Radius, such as 8/255; the one that the run trained for by default.
        norm: Linf, L2 or L1.
        version: standard, plus, rand, or custom with a list of attacks.
        attacks: For version custom: apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square.
        n_examples: Attack only that many test images, a random subset drawn by the seed; the report says so.
        checkpoint: best or last; the best there is by default.
        data: Another data set than the run's own.
        root: Folder that holds the data set, in torchvision's layout.
        batch_size: Images attacked at a time.
        precision: Of the search, fp32 or bf16; each adversarial example is verified in fp32 either way.
        compile: Search with a model compiled by torch.compile.
        seed: Of the attacks.
        device: cpu, cuda, ...; a GPU where there is one by default, under torchrun each process its own.
        progress: Show a progress bar (on a terminal).

    Returns:
        The report, as evaluation.json holds it.

    Raises:
        FileNotFoundError: No such run, checkpoint or data set.
        ValueError: Settings that cannot be right.
    """
    directory = RunDirectory(run)
    config = directory.config()
    path = directory.published_weights() if checkpoint is None else directory.weights(checkpoint)
    model = load_model(path).to(device or own_device())
    trained = config["data"]
    class_counts = trained.get("class_counts")
    splits = load_dataset(
        data or trained["name"],
        root=root or trained.get("root"),
        val_fraction=0.0,
        image_size=trained.get("image_size"),
    )
    settings = {
        "norm": norm,
        "eps": parse_fraction(config["method"]["eps"] if eps is None else eps),
        "version": version,
        "attacks": attacks,
        "seed": seed,
        "batch_size": batch_size,
        "n_examples": n_examples,
        "precision": precision,
        "compile": compile,
    }
    report = evaluate(
        model,
        splits.test,
        state_dir=directory.path / "evaluation_state" / _digest(path, data, settings),
        class_counts=class_counts if class_counts and is_long_tailed(class_counts) else None,
        progress=progress,
        **settings,
    )
    report = replace(report, data_name=data or trained["name"])
    if is_main():
        directory.write_evaluation(report.to_dict(), report.examples and report.examples.to_dict())
    return report


def _digest(weights: Path, data: str | None, settings: dict) -> str:
    """Return a short name for an evaluation, so that one with other weights or settings keeps a state of its own."""
    digest = hashlib.sha256(weights.read_bytes())
    digest.update(repr((data, sorted(settings.items()))).encode())
    return digest.hexdigest()[:16]
