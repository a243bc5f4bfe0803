"""Measurements of trained models that are named as on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from at_extensions.analysis import LayerCriticality, layer_criticality
from at_extensions.attacks import PGD
from at_extensions.checks import check_device
from at_extensions.data import load_test
from at_extensions.models import check_fits
from at_extensions.named_models import open_model
from at_extensions.processes import own_device
from at_extensions.publishing import write_criticality
from at_extensions.runs import check_writable
from at_extensions.settings import CriticalitySettings

_MEASURE = ("trials", "reset", "divergence", "batch_size", "seed", "ci_width", "max_trials", "memory_limit", "progress")


def analyze_criticality(settings: CriticalitySettings | None = None, **options: Any) -> dict[str, LayerCriticality]:
    """Measure layer criticality of trained models on test images; write JSON, CSV and pictures.

    Args:
        settings: The settings.
        **options: Single settings by name (see ``CriticalitySettings``), such as ``model=["runs/a", "runs/b"]``.

    Returns:
        The result of each model, by its name.

    Raises:
        FileNotFoundError: No such run, checkpoint or data set.
        OSError: The folder cannot be written.
        TypeError, ValueError: Settings that cannot be right.
    """
    settings = CriticalitySettings.of(settings, options)
    device = own_device() if settings.device is None else check_device(settings.device)
    models = settings.model
    checkpoints = [None] * len(models) if settings.checkpoint is None else settings.checkpoint
    if len(checkpoints) != len(models):
        raise ValueError(f"got {len(checkpoints)} checkpoints for {len(models)} models; give one for each")
    labels, eps = _labels(models, checkpoints), settings.attack_eps
    test = load_test(settings.data, root=settings.root, image_size=settings.image_size)
    images, targets = test.subset(min(settings.n_examples, len(test)), seed=0).tensors()
    check_writable(settings.out)
    results = {}
    for label, name, weights in zip(labels, models, checkpoints):
        network, fresh = open_model(
            name,
            weights,
            num_classes=test.num_classes,
            dataset={10: "cifar10", 100: "cifar100"}.get(test.num_classes, "imagenet"),
            threat_model=settings.threat_model,
            folder=settings.model_folder,
        )
        network = check_fits(network.to(device), images[0], settings.data)
        results[label] = layer_criticality(
            network,
            images,
            targets,
            fresh=fresh,
            inputs=None if eps is None else PGD(network, eps, eps / 4, settings.attack_steps),
            **{key: getattr(settings, key) for key in _MEASURE},
        )
    write_criticality(results, settings.out)
    return results


def _labels(models: Sequence[str], checkpoints: Sequence[str | None]) -> list[str]:
    """Return a short name for each model: the last part of its path, or all of it where two are alike."""
    short = [Path(c or m).stem if (c or m).endswith((".safetensors", ".pt", ".pth")) else Path(m).name
             for m, c in zip(models, checkpoints)]  # fmt: skip
    full = [m if c is None else f"{m} {c}" for m, c in zip(models, checkpoints)]
    labels = [s if short.count(s) == 1 else f for s, f in zip(short, full)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the same model twice: {sorted(labels)}")
    return labels
