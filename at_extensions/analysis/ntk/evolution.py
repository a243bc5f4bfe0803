"""The kernel of a network in the course of its training: distances between epochs, rank, alignment, specialisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.analysis.ntk.kernel import Predicate, empirical_ntk
from at_extensions.analysis.ntk.measures import (
    effective_rank,
    kernel_distance,
    kernel_specialization,
    kernel_target_alignment,
    top_eigenvalue_mass,
)
from at_extensions.attacks import check_attack, perturb
from at_extensions.checks import check_count, check_images, check_labels, device_of
from at_extensions.models import load_model
from at_extensions.progress import bar
from at_extensions.runs import RunDirectory
from at_extensions.untouched import RandomStream, isolated

OUTPUTS = ("class", "trace", "sum")
"""Kernels that can be followed."""


@dataclasses.dataclass(frozen=True, repr=False)
class KernelEvolution:
    """The kernel of each checkpoint, measured; T checkpoints, N images.

    Attributes:
        epochs: T numbers.
        distances: ``kernel_distance`` between all pairs (T, T).
        effective_rank: T numbers.
        top_mass: ``top_eigenvalue_mass`` of the ten largest eigenvalues, T numbers.
        alignment: ``kernel_target_alignment``, T numbers; None without labels.
        specialization: ``kernel_specialization``, T numbers; None without labels or without a kernel a class.
        spectra: Eigenvalues in falling order, as shares of their sum (T, N).
        kernels: (T, N, N): the trace kernel, or the one of the sum of logits.
        outputs: ``"class"``, ``"trace"`` or ``"sum"``.
        perturbed: Whether each checkpoint was measured on adversarial examples of its own.
    """

    epochs: list[int]
    distances: Tensor
    effective_rank: list[float]
    top_mass: list[float]
    alignment: list[float] | None
    specialization: list[float] | None
    spectra: Tensor
    kernels: Tensor
    outputs: str
    perturbed: bool

    @property
    def velocity(self) -> list[float]:
        """Distance of each kernel to the one before it, T - 1 numbers."""
        return self.distances.diagonal(1).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the kernels, as JSON types."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "kernels"}
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items()} | {
            "n_images": self.kernels.shape[1]
        }

    def __repr__(self) -> str:
        columns = {"epoch": self.epochs, "moved": [math.nan, *self.velocity], "rank": self.effective_rank}
        columns |= {"top 10": self.top_mass}
        columns |= {} if self.alignment is None else {"alignment": self.alignment}
        columns |= {} if self.specialization is None else {"special.": self.specialization}
        kind = "adversarial examples" if self.perturbed else "images"
        lines = [f"KernelEvolution: {self.outputs} kernel of {self.kernels.shape[1]} {kind}"]
        lines.append("  ".join(f"{name:>9}" for name in columns))
        for row in zip(*columns.values()):
            shown = ("" if isinstance(v, float) and math.isnan(v) else f"{v:.4g}" for v in row)
            lines.append("  ".join(f"{text:>9}" for text in shown))
        return "\n".join(lines)


def kernel_evolution(
    run: RunDirectory | str,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    inputs: Callable[[nn.Module], Attack] | None = None,
    epochs: Sequence[int] | None = None,
    outputs: str = "class",
    params: Predicate | Sequence[str] | None = None,
    memory_limit: int = 4 * 2**30,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> KernelEvolution:
    """Measure the empirical NTK of each kept epoch of a run on the same images.

    Inspired by Li et al. (arXiv 2312.02236), who follow the kernel of adversarial training by the distance between
    epochs, its specialisation by class, and its effective rank; the measures are *reconstructions* (see
    ``kernel_distance``, ``kernel_specialization``, ``effective_rank``).

    Args:
        run: A run directory with kept epochs (``train --keep-every n``).
        images: (N, C, H, W) in [0, 1].
        labels: Class numbers (N,), for alignment and specialisation; needed with ``inputs``.
        inputs: Makes an attack from a checkpoint's model, such as ``lambda m: PGD(m, 8 / 255)``; the kernel is then
            that of each checkpoint's own adversarial examples.
        epochs: Which kept epochs; all by default.
        outputs: ``"class"``: the trace kernel, and one of each class for the specialisation. ``"trace"``, ``"sum"``: as
            in ``empirical_ntk``, without specialisation.
        params: As in ``empirical_ntk``.
        memory_limit: As in ``empirical_ntk``.
        dtype: As in ``empirical_ntk``.
        device: Where the models run; the images' device if None.
        seed: Of the attack's random starts, the same ones for each checkpoint.
        progress: Show progress.

    Raises:
        FileNotFoundError: The run has kept no epochs.
        TypeError, ValueError: Images, labels or settings that cannot be right, or an epoch that was not kept.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    kept = run.kept()
    if not kept:
        raise FileNotFoundError(f"{run.path} has kept no epochs; train with --keep-every n, Trainer(keep_every=n)")
    chosen = list(kept) if epochs is None else [check_count("each of epochs", epoch) for epoch in epochs]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"epochs must hold at least one epoch, each once, got {chosen}")
    for epoch in chosen:
        if epoch not in kept:
            raise ValueError(f"{run.path} has not kept epoch {epoch}; it has {', '.join(map(str, kept))}")
    device = images.device if device is None else torch.device(device)
    models = ((epoch, load_model(kept[epoch]).to(device)) for epoch in bar(chosen, "kernel of epoch", show=progress))
    return measure_kernels(
        models, images, labels, inputs=inputs, outputs=outputs, params=params, memory_limit=memory_limit, dtype=dtype,
        seed=seed,
    )  # fmt: skip


def measure_kernels(
    models: Iterable[tuple[int, nn.Module]],
    images: Tensor,
    labels: Tensor | None = None,
    *,
    inputs: Callable[[nn.Module], Attack] | None = None,
    outputs: str = "class",
    seed: int = 0,
    **options: Any,
) -> KernelEvolution:
    """Measure the empirical NTK of one model after the other, as ``kernel_evolution`` does.

    Args:
        models: (epoch, model), in order; opened one at a time.
        images: As in ``kernel_evolution``.
        labels: As in ``kernel_evolution``.
        inputs: As in ``kernel_evolution``.
        outputs: As in ``kernel_evolution``.
        seed: As in ``kernel_evolution``.
        **options: Of ``empirical_ntk``.
    """
    check_images(images)
    if labels is not None:
        check_labels(labels, size=len(images))
    elif inputs is not None:
        raise ValueError("adversarial examples need the images' labels; give labels=")
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs must be one of {', '.join(OUTPUTS)}, got {outputs!r}")
    rows: list[dict[str, Any]] = []
    for epoch, model in models:
        x = images if inputs is None else _perturbed(inputs(model), model, images, labels, seed)
        found = empirical_ntk(model, x, outputs=outputs, progress=False, **options).double()
        kernel = found.sum(0) if outputs == "class" else found
        spectrum = torch.linalg.eigvalsh(kernel).flip(0).clamp_min(0)
        row = {"epochs": epoch, "kernels": kernel, "spectra": spectrum / spectrum.sum()}
        row |= {"effective_rank": effective_rank(kernel), "top_mass": top_eigenvalue_mass(kernel, min(10, len(kernel)))}
        if labels is not None:
            row["alignment"] = kernel_target_alignment(kernel, labels.cpu())
            if outputs == "class":
                row["specialization"] = kernel_specialization(found, labels.cpu())
        rows.append(row)
    kernels = torch.stack([row["kernels"] for row in rows])
    distances = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            distances[i, j] = distances[j, i] = kernel_distance(kernels[i], kernels[j])
    listed = ("epochs", "effective_rank", "top_mass", "alignment", "specialization")
    columns = {name: [row[name] for row in rows] if name in rows[0] else None for name in listed}
    spectra = torch.stack([row["spectra"] for row in rows])
    return KernelEvolution(
        **columns, distances=distances, spectra=spectra, kernels=kernels, outputs=outputs, perturbed=inputs is not None
    )


def _perturbed(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return a model's adversarial examples on the images' device; the model and all random state are left alone."""
    check_attack(attack, model)
    device = device_of(model)
    with isolated(device):
        found = perturb(attack, images.to(device), labels.to(device), stream=RandomStream(seed))
    return found.to(images.device)
