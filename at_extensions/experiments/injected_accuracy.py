"""The measurement of runs on images with injected features: on these, on plain, reversed and bare-carrier images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from at_extensions.analysis import input_curvature
from at_extensions.attacks import PGD
from at_extensions.checks import check_count, parse_fraction
from at_extensions.data import FloatSplit, Injection, carriers, count_outside, inject, injected_range, load_dataset
from at_extensions.data.split import LabelledSplit
from at_extensions.evaluation import count_correct
from at_extensions.experiments.cell import Cell
from at_extensions.models import load_model
from at_extensions.processes import own_device
from at_extensions.runs import RunDirectory

GAP = 0.3
"""FGSM accuracy above PGD accuracy by more than this is catastrophic overfitting."""
FALL = 0.5
"""So is PGD accuracy below this share of the best during training."""

_OPPOSITE = {
    "add": "reverse",
    "reverse": "add",
    "orthogonal": "reverse_orthogonal",
    "reverse_orthogonal": "orthogonal",
}
_TEST = 2  # the role of the test split in Injection.into_split


@dataclass(frozen=True)
class InjectedAccuracy:
    """Measure the last epoch of a run with injected features, at the run's eps.

    - ``injected``, ``uninjected``, ``reversed``: ``clean``, ``fgsm`` and ``pgd<steps>`` accuracy on the test images
      with the features of the run, without any, and with the opposite ones. PGD has steps of eps / 4.
    - ``carrier_only``: ``clean`` accuracy on K images, each class's pattern on black.
    - ``input_curvature``: the largest magnitude of an eigenvalue of each injected image's input Hessian, on average
      (``analysis.input_curvature``).
    - ``outside``: values of the injected test images outside [0, 1].
    - ``collapsed``: 1 after catastrophic overfitting, else 0: FGSM accuracy exceeds PGD accuracy by more than 0.3 on
      the injected images, or validation accuracy under attack ends below half of its best.
    - ``collapse_epoch``: the first epoch with validation accuracy under attack below half of the best before; None
      without one.

    For a run without injected features, ``injected`` are the test images as they are.

    Attributes:
        pgd_steps: Steps of PGD.
        test_size: Test images, as evenly over the classes as they allow; all if None.
        curvature_images: Injected test images behind the curvature; 0 leaves it out.
    """

    pgd_steps: int = 20
    test_size: int | None = None
    curvature_images: int = 32

    def __post_init__(self) -> None:
        check_count("pgd_steps", self.pgd_steps)
        if self.test_size is not None:
            check_count("test_size", self.test_size)
        check_count("curvature_images", self.curvature_images, at_least=0)

    def __call__(self, run: RunDirectory, cell: Cell) -> dict[str, Any]:
        """Return the measurement of a run."""
        config = run.config()
        eps = parse_fraction(config["method"]["eps"])
        injection = Injection.recorded(config["data"])
        plain = _test(config["data"])
        model = load_model(run.weights("last")).to(own_device())
        images = _versions(plain, injection)
        if self.test_size is not None:
            images = {name: split.subset(min(self.test_size, len(split))) for name, split in images.items()}
        result: dict[str, Any] = {name: self._accuracies(model, split, eps) for name, split in images.items()}
        if injection is not None and injection.beta > 0:
            result["carrier_only"] = {"clean": _share(count_correct(model, _on_black(plain, injection.beta)))}
        injected = images["injected"]
        values = injected.tensors()[0]
        outside = count_outside(values)
        result["outside"] = {"values": outside, "share": outside / values.numel()}
        if self.curvature_images:
            size = min(self.curvature_images, len(injected))
            result["input_curvature"] = input_curvature(model, *injected.subset(size).tensors()).largest.mean().item()
        return result | self._verdict(result["injected"], run.metrics())

    def _accuracies(self, model: nn.Module, split: LabelledSplit, eps: float) -> dict[str, Any]:
        limits = split.image_range
        attacks = {
            "clean": None,
            "fgsm": PGD(model, eps, eps, 1, start="zero", image_range=limits),
            f"pgd{self.pgd_steps}": PGD(model, eps, eps / 4, self.pgd_steps, image_range=limits),
        }
        return {
            name: _share(count_correct(model, split, attack=attack, search=None if attack is None else "fp32"))
            for name, attack in attacks.items()
        }

    def _verdict(self, accuracies: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        gap = accuracies["fgsm"]["accuracy"] - accuracies[f"pgd{self.pgd_steps}"]["accuracy"]
        robust = [row["val_robust_accuracy"] for row in epochs if "val_robust_accuracy" in row]
        fell = bool(robust) and robust[-1] < FALL * max(robust)
        return {"collapsed": int(gap > GAP or fell), "fgsm_minus_pgd": gap, "collapse_epoch": collapse_epoch(epochs)}


def collapse_epoch(epochs: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the first epoch whose ``val_robust_accuracy`` is below half of the best before it; None without one."""
    best = 0.0
    for row in epochs:
        robust = row.get("val_robust_accuracy")
        if robust is None:
            continue
        if robust < FALL * best:
            return row["epoch"]
        best = max(best, robust)
    return None


def _test(data: Mapping[str, Any]) -> LabelledSplit:
    """Return the test images of a run's data set, without features."""
    return load_dataset(data["name"], root=data.get("root"), image_size=data.get("image_size"), val_fraction=0.0).test


def _versions(plain: LabelledSplit, injection: Injection | None) -> dict[str, LabelledSplit]:
    """Return the test images with the features of the run, without, and with the opposite ones."""
    if injection is None:
        return {"injected": plain}
    found = {"injected": injection.into_split(plain, _TEST), "uninjected": plain}
    opposite = _OPPOSITE.get(injection.mode)
    if opposite is None:
        return found
    return found | {"reversed": replace(injection, mode=opposite).into_split(plain, _TEST)}


def _on_black(plain: LabelledSplit, beta: float) -> FloatSplit:
    """Return one image a class: its pattern on black."""
    patterns = carriers(plain.num_classes, plain.image_shape)
    labels = torch.arange(plain.num_classes)
    images = inject(torch.zeros_like(patterns), labels, patterns, beta, mode="carrier_only")
    limits = injected_range(patterns, beta, "carrier_only")
    return FloatSplit(images, labels, plain.num_classes, "patterns on black", image_range=limits)


def _share(counts: torch.Tensor) -> dict[str, Any]:
    right, total = counts.tolist()
    return {"correct": right, "images": total, "accuracy": right / total}
