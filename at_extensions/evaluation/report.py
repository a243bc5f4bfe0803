"""The result of an evaluation: accuracies, verdicts, flags; to and from JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from at_extensions.data import frequency_groups
from at_extensions.evaluation.flags import Flag
from at_extensions.intervals import wilson_interval
from at_extensions.runs import write_json


@dataclass(frozen=True, eq=False)
class Examples:
    """A few samples with adversarial examples.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        adversarial: (N, C, H, W) in [0, 1].
        labels: (N,).
        clean_predictions: Classes predicted for the images (N,).
        adversarial_predictions: Classes predicted for the adversarial examples (N,).
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    clean_predictions: Tensor
    adversarial_predictions: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_LATER = {"weights", "data", "data_name", "compiled"}  # absent from reports of earlier versions


@dataclass(eq=False)
class RobustnessReport:
    """The result of an evaluation by AutoAttack. Accuracies are fractions in [0, 1].

    Attributes:
        norm: Threat model: ``"Linf"``, ``"L2"`` or ``"L1"``.
        eps: Its radius.
        version: AutoAttack's version.
        seed: Seed of the evaluation.
        n_examples: Number of samples, N.
        num_classes: Number of classes, K.
        clean_accuracy: Share of the samples classified correctly.
        robust_accuracy: Share classified correctly after every attack.
        clean: One bool a sample (N,): classified correctly.
        robust: One bool a sample (N,): correct, and no attack fooled the model on it.
        after_attack: Attack -> robust accuracy after it, in the order they ran.
        per_class: One dict a class: ``class``, ``count``, ``clean``, ``robust`` (None where the class has no sample),
            and ``train_count`` where class counts were given.
        interval: 95 % Wilson interval of robust accuracy.
        flags: Caveats.
        settings: Attack -> its settings.
        versions: Package -> version.
        device: The device of the model.
        precision: ``"fp32"``, or ``"bf16"`` for a search in bf16 that was verified in fp32.
        batch_size: Samples a batch; the random draws depend on it.
        seconds: Time in total, summed over the batches (and so over the processes).
        attack_seconds: The same for each attack.
        indices: Positions of the samples in the data, where a subset was drawn.
        groups: Accuracy by frequency in training, ``head``, ``medium`` and ``tail``: dicts of ``clean`` and ``robust``.
        weights: SHA-256 of the model's state dict (``evaluation.state_digest``); None in a report that an earlier
            version wrote.
        data: SHA-256 of the images and labels; None likewise.
        data_name: Name of the data, where the evaluation was one of a run.
        compiled: Whether the search ran on a compiled model.
        examples: A few samples with adversarial examples; not part of ``to_dict``.
    """

    norm: str
    eps: float
    version: str
    seed: int
    n_examples: int
    num_classes: int
    clean_accuracy: float
    robust_accuracy: float
    clean: Tensor
    robust: Tensor
    after_attack: dict[str, float]
    per_class: list[dict[str, Any]]
    interval: tuple[float, float]
    flags: list[Flag]
    settings: dict[str, dict[str, Any]]
    versions: dict[str, str]
    device: str
    precision: str
    batch_size: int
    seconds: float
    attack_seconds: dict[str, float]
    indices: list[int] | None = None
    groups: dict[str, dict[str, float | None]] | None = None
    weights: str | None = None
    data: str | None = None
    data_name: str | None = None
    compiled: bool = False
    examples: Examples | None = field(default=None)

    @property
    def reliable(self) -> bool:
        """Whether no flag says that robustness may be less than reported."""
        return not any(flag.overestimates for flag in self.flags)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the examples as JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "examples"}
        values["clean"], values["robust"] = self.clean.tolist(), self.robust.tolist()
        values["interval"] = list(self.interval)
        values["flags"] = [asdict(flag) for flag in self.flags]
        values["reliable"] = self.reliable
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RobustnessReport:
        """Return the report that ``to_dict`` described.

        Raises:
            ValueError: Something is missing or unknown.
        """
        names = {f.name for f in fields(cls)} - {"examples"}
        missing, unknown = sorted(names - values.keys() - _LATER), sorted(values.keys() - names - {"reliable"})
        if missing or unknown:
            raise ValueError(f"not a robustness report: missing {missing}, unknown {unknown}")
        values = {name: values[name] for name in names & values.keys()}
        for name in ("clean", "robust"):
            values[name] = torch.tensor(values[name], dtype=torch.bool)
        values["interval"] = tuple(values["interval"])
        values["flags"] = [Flag(**flag) for flag in values["flags"]]
        return cls(**values)

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, atomically, and return the path."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> RobustnessReport:
        """Read a report that ``save`` wrote.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not a report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a robustness report: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not a robustness report")
        return cls.from_dict(values)

    def __repr__(self) -> str:
        pixels = f" ({self.eps * 255:.4g}/255)" if self.norm == "Linf" else ""
        precision = "" if self.precision == "fp32" else f", searched in {self.precision}, verified in fp32"
        rows = [("clean", self.clean_accuracy), *((f"after {k}", v) for k, v in self.after_attack.items())]
        low, high = self.interval
        return "\n".join(
            [
                f"RobustnessReport: {self.norm} eps {self.eps:.5g}{pixels}, {self.version}, "
                f"{self.n_examples} samples, seed {self.seed}{precision}",
                *(f"  {name:<16}{100 * accuracy:6.2f} %" for name, accuracy in rows),
                f"  {'robust':<16}{100 * self.robust_accuracy:6.2f} %   [{100 * low:.2f}, {100 * high:.2f}] at 95 %",
                *(f"  {'! ' + flag.name:<16}{flag.message}" for flag in self.flags),
            ]
        )


def summary(
    labels: Tensor, clean: Tensor, robust: Tensor, num_classes: int, class_counts: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the fields of a report that follow from the verdicts.

    Args:
        labels: (N,).
        clean: Which samples are classified correctly (N,).
        robust: Which of them are robust against every attack (N,).
        num_classes: K.
        class_counts: Training samples of each class (K,), if known.
    """
    groups = None if class_counts is None else accuracy_by_frequency(labels, clean, robust, class_counts)
    return {
        "n_examples": len(labels),
        "num_classes": num_classes,
        "clean": clean,
        "robust": robust,
        "clean_accuracy": clean.double().mean().item(),
        "robust_accuracy": robust.double().mean().item(),
        "per_class": accuracy_by_class(labels, clean, robust, num_classes, class_counts),
        "interval": wilson_interval(int(robust.sum()), len(labels)),
        "groups": groups,
    }


def accuracy_by_class(
    labels: Tensor, clean: Tensor, robust: Tensor, num_classes: int, class_counts: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Return ``per_class`` of a report."""
    rows = []
    for c in range(num_classes):
        members = labels == c
        row = {"class": c, "count": int(members.sum()), **_accuracies(clean, robust, members)}
        rows.append(row if class_counts is None else row | {"train_count": int(class_counts[c])})
    return rows


def accuracy_by_frequency(
    labels: Tensor, clean: Tensor, robust: Tensor, class_counts: Sequence[int]
) -> dict[str, dict[str, float | None]]:
    """Return ``groups`` of a report: accuracy on ``data.frequency_groups`` of the training counts."""
    groups = {name: torch.tensor(c, dtype=torch.long) for name, c in frequency_groups(class_counts).items()}
    return {name: _accuracies(clean, robust, torch.isin(labels, classes)) for name, classes in groups.items()}


def _accuracies(clean: Tensor, robust: Tensor, members: Tensor) -> dict[str, float | None]:
    if not members.any():
        return {"clean": None, "robust": None}
    return {"clean": clean[members].double().mean().item(), "robust": robust[members].double().mean().item()}
