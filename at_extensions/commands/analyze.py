"""Measurements of trained models that are named as on the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from at_extensions.analysis import (
    Dispersion,
    GradientInstability,
    KernelEvolution,
    LayerCriticality,
    gradient_instability,
    kernel_evolution,
    layer_criticality,
    local_dispersion,
    measure_kernels,
)
from at_extensions.attacks import PGD
from at_extensions.checks import check_device
from at_extensions.data import load_test
from at_extensions.methods import create_method
from at_extensions.models import check_fits
from at_extensions.named_models import open_model
from at_extensions.processes import own_device
from at_extensions.progress import bar
from at_extensions.publishing import kernel_plots, write_criticality
from at_extensions.publishing.figures import save_png
from at_extensions.publishing.instability_plots import instability_curves
from at_extensions.runs import RunDirectory, atomic, check_writable, write_json
from at_extensions.settings import (
    CriticalitySettings,
    DispersionSettings,
    InstabilitySettings,
    MeasureSettings,
    NTKSettings,
)

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
    eps, results = settings.attack_eps, {}
    for label, network, fresh, images, targets in _Models(settings):
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


def analyze_dispersion(settings: DispersionSettings | None = None, **options: Any) -> dict[str, Dispersion]:
    """Measure the local dispersion of PGD on test images; write ``dispersion.json``.

    Args:
        settings: The settings.
        **options: Single settings by name (see ``DispersionSettings``), such as ``model=["runs/a"], eps="8/255"``.

    Returns:
        The result of each model, by its name.

    Raises:
        FileNotFoundError: No such run, checkpoint or data set.
        OSError: The folder cannot be written.
        TypeError, ValueError: Settings that cannot be right.
    """
    settings = DispersionSettings.of(settings, options)
    results = {}
    for label, network, _, images, targets in bar(_Models(settings), "dispersion of", show=settings.progress):
        alpha = settings.eps / 4 if settings.alpha is None else settings.alpha
        results[label] = local_dispersion(
            network,
            PGD(network, settings.eps, alpha, settings.steps),
            images,
            targets,
            starts=settings.starts,
            norm=float(settings.norm),
            seed=settings.seed,
            batch_size=settings.batch_size,
        )
    _write(settings, "dispersion", {label: result.to_dict() for label, result in results.items()})
    return results


def analyze_instability(settings: InstabilitySettings | None = None, **options: Any) -> dict[str, GradientInstability]:
    """Measure the gradient instability of a training method on test images; write JSON and a picture.

    Args:
        settings: The settings.
        **options: Single settings by name (see ``InstabilitySettings``), such as ``model=["runs/a"], method="trades"``.

    Returns:
        The result of each model, by its name.

    Raises:
        FileNotFoundError: No such run, checkpoint or data set.
        OSError: The folder cannot be written.
        TypeError, ValueError: Settings that cannot be right.
    """
    settings = InstabilitySettings.of(settings, options)
    results = {}
    for label, network, _, images, targets in bar(_Models(settings), "instability of", show=settings.progress):
        offered = {"eps": settings.eps, "seed": settings.seed, "num_samples": len(images), "epochs": 1}
        offered |= {"num_classes": int(targets.max()) + 1, "class_counts": targets.bincount().clamp(min=1).tolist()}
        results[label] = gradient_instability(
            network,
            create_method(settings.method, network, offered=offered),
            images,
            targets,
            direction=settings.direction,
            **({} if settings.steps is None else {"steps": settings.steps}),
            lr=settings.lr,
            index=torch.arange(len(images)),
            seed=settings.seed,
        )
    _write(settings, "instability", {label: result.to_dict() for label, result in results.items()})
    save_png(instability_curves(results), Path(settings.out) / "instability.png")
    return results


def analyze_ntk(settings: NTKSettings | None = None, **options: Any) -> dict[str, KernelEvolution]:
    """Measure the empirical NTK of trained models on test images, over the kept epochs of runs that have some.

    Writes ``ntk.json``, and for each model its kernels and spectra (``NAME.npz``) and a picture (``NAME.png``).

    Args:
        settings: The settings.
        **options: Single settings by name (see ``NTKSettings``), such as ``model=["runs/a"], n_examples=200``.

    Returns:
        The result of each model, by its name.

    Raises:
        FileNotFoundError: No such run, checkpoint or data set.
        OSError: The folder cannot be written.
        TypeError, ValueError: Settings that cannot be right; a memory limit that is too small.
    """
    settings = NTKSettings.of(settings, options)
    eps, results, out = settings.attack_eps, {}, Path(settings.out)
    shared = {
        "inputs": None if eps is None else lambda m: PGD(m, eps, eps / 4, settings.attack_steps),
        "outputs": settings.outputs,
        "memory_limit": settings.memory_limit,
        "dtype": torch.float64 if settings.double else None,
        "seed": settings.seed,
    }
    models = _Models(settings)
    for model, (label, network, _, images, targets) in zip(settings.model, models, strict=True):
        if RunDirectory(model).kept():
            found = kernel_evolution(model, images, targets, device=models.device, progress=settings.progress, **shared)
        else:
            found = measure_kernels([(0, network)], images, targets, **shared)
        results[label] = found
        name = re.sub(r"[^\w.+-]+", "_", label).strip("_")
        arrays = {"epochs": found.epochs, "kernels": found.kernels.numpy(), "spectra": found.spectra.numpy()}
        with atomic(out / f"{name}.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays, labels=targets.numpy())
        save_png(kernel_plots.kernel_evolution(found), out / f"{name}.png")
    _write(settings, "ntk", {label: result.to_dict() for label, result in results.items()})
    return results


def _write(settings: MeasureSettings, name: str, results: dict[str, Any]) -> None:
    write_json(Path(settings.out) / f"{name}.json", {"settings": settings.to_dict(), "models": results})


class _Opened(NamedTuple):
    """A trained model with the images to measure it on."""

    label: str
    network: nn.Module
    fresh: Callable[[int], nn.Module] | None
    images: Tensor
    targets: Tensor


class _Models:
    """The models that the settings name, opened one after the other, with their images."""

    def __init__(self, settings: MeasureSettings):
        self.settings = settings
        self.device = own_device() if settings.device is None else check_device(settings.device)
        models = settings.model
        checkpoints = [None] * len(models) if settings.checkpoint is None else settings.checkpoint
        if len(checkpoints) != len(models):
            raise ValueError(f"got {len(checkpoints)} checkpoints for {len(models)} models; give one for each")
        self.named = list(zip(_labels(models, checkpoints), models, checkpoints))
        self.test = load_test(settings.data, root=settings.root, image_size=settings.image_size)
        check_writable(settings.out)

    def __len__(self) -> int:
        return len(self.named)

    def __iter__(self) -> Iterator[_Opened]:
        settings, test = self.settings, self.test
        images, targets = test.subset(min(settings.n_examples, len(test)), seed=0).tensors()
        for label, name, weights in self.named:
            network, fresh = open_model(
                name,
                weights,
                num_classes=test.num_classes,
                dataset={10: "cifar10", 100: "cifar100"}.get(test.num_classes, "imagenet"),
                threat_model=settings.threat_model,
                folder=settings.model_folder,
            )
            network = check_fits(network.to(self.device), images[0], settings.data)
            yield _Opened(label, network, fresh, images, targets)


def _labels(models: Sequence[str], checkpoints: Sequence[str | None]) -> list[str]:
    """Return a short name for each model: the last part of its path, or all of it where two are alike."""
    short = [Path(c or m).stem if (c or m).endswith((".safetensors", ".pt", ".pth")) else Path(m).name
             for m, c in zip(models, checkpoints)]  # fmt: skip
    full = [m if c is None else f"{m} {c}" for m, c in zip(models, checkpoints)]
    labels = [s if short.count(s) == 1 else f for s, f in zip(short, full)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the same model twice: {sorted(labels)}")
    return labels
