"""The evaluation of a trained run: its published weights on its own test split, written into its directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from at_extensions.checks import check_name, parse_fraction
from at_extensions.data import load_dataset
from at_extensions.evaluation.autoattack import evaluate
from at_extensions.evaluation.report import RobustnessReport
from at_extensions.models import load_model
from at_extensions.runs import KINDS, RunDirectory


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
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """Attack a run's model with AutoAttack on its test split; write evaluation.json and a few examples into the run.

    Args:
        run: A run directory.
        eps: Radius, such as 8/255; the one that the run trained for by default.
        norm: Linf, L2 or L1.
        version: standard, plus, rand, or custom with a list of attacks.
        attacks: For version custom: apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square.
        n_examples: Attack only that many test images, as evenly over the classes as they allow; the report says so.
        checkpoint: best or last; the best there is by default.
        data: Another data set than the run's own.
        root: Folder that holds the data set, in torchvision's layout.
        batch_size: Images attacked at a time.
        precision: Of the search, fp32 or bf16; each adversarial example is verified in fp32 either way.
        seed: Of the attacks.
        device: cpu, cuda, ...; a GPU where there is one by default.
        progress: Show a progress bar (on a terminal).

    Returns:
        The report, as evaluation.json holds it.

    Raises:
        FileNotFoundError: No such run, checkpoint or data set.
        ValueError: Settings that cannot be right.
    """
    directory = RunDirectory(run)
    config = directory.config()
    model = _published_model(directory, checkpoint, device)
    trained = config["data"]
    splits = load_dataset(
        data or trained["name"],
        root=root or trained.get("root"),
        val_fraction=0.0,
        image_size=trained.get("image_size"),
    )
    split = splits.test if n_examples is None else splits.test.subset(n_examples, seed=0)
    report = evaluate(
        model,
        split,
        norm=norm,
        eps=parse_fraction(config["method"]["eps"] if eps is None else eps),
        version=version,
        attacks=attacks,
        seed=seed,
        batch_size=batch_size,
        precision=precision,
        state_dir=directory.path / "evaluation_state",
        class_counts=config["data"].get("class_counts") if config["data"].get("imbalance_ratio") else None,
        progress=progress,
    )
    directory.write_evaluation(report.to_dict(), report.examples and report.examples.to_dict())
    return report


def _published_model(directory: RunDirectory, checkpoint: str | None, device: str | None) -> nn.Module:
    if checkpoint is None:
        path = directory.published_weights()
    else:
        path = directory.weights(check_name("checkpoint", checkpoint, KINDS))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(path).to(device)
