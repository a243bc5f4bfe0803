"""Evaluation of a run or of a user's own checkpoint: AutoAttack on a test split, written into the run directory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from at_extensions.checks import parse_fraction
from at_extensions.commands.own_model import adopt
from at_extensions.data import is_long_tailed, load_test
from at_extensions.evaluation.autoattack import evaluate
from at_extensions.evaluation.report import RobustnessReport
from at_extensions.named_models import open_run
from at_extensions.processes import is_main, own_device
from at_extensions.publishing.naming import data_name
from at_extensions.runs import RunDirectory


def evaluate_run(
    run: str | Path,
    *,
    model: str | None = None,
    weights: str | None = None,
    weights_key: str | None = None,
    model_options: dict | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    eps: str | float | None = None,
    norm: str = "Linf",
    version: str = "standard",
    attacks: list[str] | None = None,
    n_examples: int | None = None,
    checkpoint: str | None = None,
    data: str | None = None,
    root: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    severity: int | None = None,
    batch_size: int | None = None,
    precision: str = "fp32",
    compile: bool = False,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """Attack a run's model with AutoAttack on its test split; write evaluation.json and a few examples into the run.

    With a model or weights, the run is made of that checkpoint first, and need not exist. Of a factory, a run directory
    holds the source, which each later command on it runs. Under torchrun the batches are dealt over the processes, and
    the first one writes.

    Args:
        run: A run directory; the one to make, where model or weights are given.
        model: A name of at_extensions.list_models(), or package.module:factory (file.py:factory) for a class or
            function of yours that returns the network.
        weights: Your checkpoint: .pt, .pth, .ckpt or .safetensors, in any of the usual containers.
        weights_key: Which of several sets of weights in the file to take, such as state_dict_ema.
        model_options: Arguments of the architecture or factory, such as {"width": 16}.
        mean: Subtracted from images in [0, 1] before the network, one number a channel.
        std: Divided by, one number a channel.
        eps: Radius, such as 8/255; the one that the run trained for by default.
        norm: Linf, L2 or L1.
        version: standard, plus, rand, or custom with a list of attacks.
        attacks: For version custom: apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square.
        n_examples: Attack only that many test images, a random subset drawn by the seed; the report says so.
        checkpoint: best or last; the best there is by default.
        data: Another data set than the run's own: a name, npz:PATH, folder:PATH, cifar10c:PATH or cifar100c:PATH.
        root: Folder that holds the data set, in torchvision's layout.
        image_size: Side in pixels of the images of a folder.
        num_classes: Number of classes, where the labels of an npz file do not tell.
        severity: Of CIFAR-10-C and CIFAR-100-C, from 1 to 5; all five by default.
        batch_size: Images attacked at a time.
        precision: Of the search, fp32 or bf16; each adversarial example is verified in fp32 either way.
        compile: Search with a model compiled by torch.compile.
        seed: Of the attacks.
        device: cpu, cuda, ...; a GPU where there is one by default, under torchrun each process its own.
        progress: Show a progress bar (on a terminal).

    Returns:
        The report, as evaluation.json holds it.

    Raises:
        FileExistsError: The directory holds another run than the checkpoint's.
        FileNotFoundError: No such run, checkpoint or data set.
        ValueError: Settings that cannot be right.
    """
    directory = RunDirectory(run)
    own = model is not None or weights is not None
    config = directory.config()
    recorded = {} if own else config.get("data") or {}
    _check_given(directory, own, config, data, eps)
    described = {"name": data or recorded["name"], "root": root or recorded.get("root")}
    chosen = {"image_size": image_size, "num_classes": num_classes, "severity": severity}
    if data is None:
        chosen = {key: recorded.get(key) if value is None else value for key, value in chosen.items()}
    described |= {key: value for key, value in chosen.items() if value is not None}
    test = load_test(described["name"], root=described["root"], **chosen)
    if own:
        options = {"weights_key": weights_key, "model_options": model_options, "mean": mean, "std": std}
        adopt(directory, test, described, model=model, weights=weights, progress=progress, **options)
    net = open_run(directory, checkpoint).model.to(device or own_device())
    class_counts = recorded.get("class_counts")
    settings = {
        "norm": norm,
        "eps": parse_fraction((config.get("method") or {}).get("eps") if eps is None else eps),
        "version": version,
        "attacks": attacks,
        "seed": seed,
        "batch_size": batch_size,
        "n_examples": n_examples,
        "precision": precision,
        "compile": compile,
    }
    path = directory.published_weights() if checkpoint is None else directory.weights(checkpoint)
    report = evaluate(
        net,
        test,
        state_dir=directory.path / "evaluation_state" / _digest(path, data, settings | chosen),
        class_counts=class_counts if class_counts and is_long_tailed(class_counts) else None,
        progress=progress,
        **settings,
    )
    report = replace(report, data_name=data_name(described))
    if is_main():
        directory.write_evaluation(report.to_dict(), report.examples and report.examples.to_dict())
    return report


def _check_given(run: RunDirectory, own: bool, config: Mapping[str, Any], data: str | None, eps: Any) -> None:
    """Refuse an evaluation whose data or radius nobody said, before anything is read."""
    if own and data is None:
        raise ValueError("say which test data to evaluate a checkpoint on: --data cifar10, npz:PATH or folder:PATH")
    if not own and not config:
        run.published_weights()  # its error says whether that is a run directory at all
        raise FileNotFoundError(f"{run.path} has no config.yaml; evaluate its weights in a directory of their own: "
                                "at-extensions evaluate DIR --model NAME --weights FILE")  # fmt: skip
    if eps is None and (own or (config.get("method") or {}).get("eps") is None):
        raise ValueError("say the radius of the attack: --eps 8/255")


def _digest(weights: Path, data: str | None, settings: dict) -> str:
    """Return a short name for an evaluation, so that one with other weights or settings keeps a state of its own."""
    digest = hashlib.sha256(weights.read_bytes())
    digest.update(repr((data, sorted(settings.items()))).encode())
    return digest.hexdigest()[:16]
