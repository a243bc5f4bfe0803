"""Layer criticality of several named models at once, written as JSON, CSV and pictures."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from at_extensions.analysis import LayerCriticality, layer_criticality
from at_extensions.attacks import PGD
from at_extensions.checks import check_count, check_eps, parse_fraction
from at_extensions.data import load_dataset
from at_extensions.named_models import open_model
from at_extensions.publishing import criticality_plots as plots
from at_extensions.publishing.figures import save_png
from at_extensions.runs import write_json, write_text

_COLUMNS = ("model", "layer", "stage", "criticality", "std", "low", "high", "trials", "accuracy_after", "settled")


def analyze_criticality(
    *,
    model: str | list[str],
    checkpoint: str | list[str | None] | None = None,
    data: str = "cifar10",
    root: str | None = None,
    image_size: int | None = None,
    n_images: int = 1000,
    out: str = "runs/criticality",
    trials: int = 3,
    reset: str = "random",
    divergence: str = "cosine",
    attack_eps: str | float | None = None,
    attack_steps: int = 10,
    ci_width: float | None = None,
    max_trials: int = 20,
    batch_size: int = 64,
    memory_limit: int = 2 * 2**30,
    seed: int = 0,
    threat_model: str = "Linf",
    model_folder: str = "models",
    device: str | None = None,
    progress: bool = True,
) -> dict[str, LayerCriticality]:
    """Measure layer criticality of trained models on test images; write JSON, CSV and pictures.

    Args:
        model: Run directories, weights files, RobustBench ids or architectures, in any mix.
        checkpoint: Weights for architectures, one for each model; timm's pretrained ones by default.
        data: Data set, as for training.
        root: Folder that holds the data set, in torchvision's layout.
        image_size: Side in pixels of the images of a folder.
        n_images: Test images to measure on at most, as evenly over the classes as they allow.
        out: Folder to write into.
        trials: Resets of each layer.
        reset: random, norm_matched, permute or zero.
        divergence: cosine, js or kl.
        attack_eps: Measure on PGD examples of this Linf radius, such as 8/255, instead of clean images.
        attack_steps: Steps of that attack, each of a quarter of the radius.
        ci_width: Go on with trials until each layer's 95 % interval is this narrow.
        max_trials: Where that stops at the latest.
        batch_size: Images at a time, at most.
        memory_limit: Bytes that may be kept to save work.
        seed: Trial t draws its network with seed + t.
        threat_model: RobustBench's, for ids: Linf, L2 or corruptions.
        model_folder: Where RobustBench keeps what it downloads.
        device: cpu, cuda, ...; a GPU where there is one by default.
        progress: Show a progress bar (on a terminal).

    Returns:
        By model, what was measured.

    Raises:
        FileNotFoundError: No such run, checkpoint or data set.
        ValueError: Settings that cannot be right.
    """
    models = [model] if isinstance(model, str) else list(model)
    checkpoints = _per_model(checkpoint, len(models))
    eps = None if attack_eps is None else check_eps(parse_fraction(attack_eps), name="attack_eps")
    check_count("attack_steps", attack_steps)
    splits = load_dataset(data, root=root, val_fraction=0.0, image_size=image_size)
    n_images = min(check_count("n_images", n_images), len(splits.test))
    images, labels = splits.test.subset(n_images, seed=0).tensors()
    results = {}
    for label, name, weights in zip(_labels(models, checkpoints), models, checkpoints):
        network, fresh = open_model(
            name,
            weights,
            num_classes=splits.num_classes,
            dataset={10: "cifar10", 100: "cifar100"}.get(splits.num_classes, "imagenet"),
            threat_model=threat_model,
            folder=model_folder,
        )
        network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        results[label] = layer_criticality(
            network,
            images,
            labels,
            fresh=fresh,
            trials=trials,
            reset=reset,
            inputs=None if eps is None else PGD(network, eps, eps / 4, attack_steps),
            divergence=divergence,
            batch_size=batch_size,
            seed=seed,
            ci_width=ci_width,
            max_trials=max_trials,
            memory_limit=memory_limit,
            progress=progress,
        )
    write_criticality(results, out)
    return results


def write_criticality(results: Mapping[str, LayerCriticality], out: str | Path) -> list[Path]:
    """Write results and their pictures into a folder and return the paths.

    ``criticality.json`` (``read_criticality`` reads it), ``criticality.csv`` with a row a layer,
    ``criticality_depth.png``, ``criticality_heatmap.png``, ``criticality_stages.png``, and for each model but the first
    what it adds to the first, ``criticality_<model>_minus_<first>.png``, where they share layers.

    Raises:
        ValueError: No results, or different divergences.
    """
    out = Path(out)
    figures = {
        "depth": plots.depth_curves(results),
        "heatmap": plots.heat_map(results),
        "stages": plots.stage_bars(results),
    } | _differences(results)
    written = [
        write_json(out / "criticality.json", {name: result.to_dict() for name, result in results.items()}),
        write_text(out / "criticality.csv", _table(results)),
    ]
    return written + [save_png(f, out / f"criticality_{name}.png") for name, f in figures.items()]


def read_criticality(path: str | Path) -> dict[str, LayerCriticality]:
    """Read the results that ``write_criticality`` wrote.

    Args:
        path: The folder, or its ``criticality.json``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not one of ours.
    """
    path = Path(path)
    path = path / "criticality.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no results of layer criticality at {path}")
    try:
        return {name: LayerCriticality.from_dict(data) for name, data in json.loads(path.read_text("utf-8")).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold results of layer criticality: {error!r}") from error


def _differences(results: Mapping[str, LayerCriticality]) -> dict:
    (base, first), *others = results.items()
    figures = {}
    for name, result in others:
        if set(first.short_names.values()) & set(result.short_names.values()):
            key = f"{_slug(name)}_minus_{_slug(base)}"
            figures[key] = plots.difference_bars(first, result, (base, name))
    return figures


def _table(results: Mapping[str, LayerCriticality]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for model, result in results.items():
        writer.writerows({"model": model, **row} for row in result.to_dict()["layers"])
    return buffer.getvalue()


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)


def _per_model(checkpoint: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    if checkpoint is None:
        return [None] * count
    given = [checkpoint] if isinstance(checkpoint, str) else list(checkpoint)
    if len(given) != count:
        raise ValueError(f"got {len(given)} checkpoints for {count} models; give one for each")
    return given


def _labels(models: Sequence[str], checkpoints: Sequence[str | None]) -> list[str]:
    """What results call each model: the last part of its name, as much of it as tells them apart."""
    short = [Path(c or m).stem if (c or m).endswith((".safetensors", ".pt", ".pth")) else Path(m).name
             for m, c in zip(models, checkpoints)]  # fmt: skip
    full = [m if c is None else f"{m} {c}" for m, c in zip(models, checkpoints)]
    labels = [s if short.count(s) == 1 else f for s, f in zip(short, full)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the same model twice: {sorted(labels)}")
    return labels
