"""Results of the induced distribution experiment: errors of its networks, differences, dispersion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from at_extensions.intervals import PairedDifference, paired_bootstrap, wilson_interval

NETS = ("a", "b", "clean", "zero")
"""The networks, by the set that each is trained on."""

DIFFERENCES = (("a", "b"), ("a", "clean"), ("b", "clean"))
SETS = ("a", "b", "test")


@dataclass(frozen=True, eq=False, repr=False)
class NetError:
    """Test error of one network.

    Attributes:
        correct: Which test images it classifies correctly (N,), bool.
        train_accuracy: Accuracy over its last epoch, on its training images as they were trained on.
    """

    correct: Tensor
    train_accuracy: float

    @property
    def error(self) -> float:
        """Share of test images that it misclassifies."""
        return 1 - self.correct.double().mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the error; it covers the choice of test images, not the randomness of training."""
        return wilson_interval(int((~self.correct).sum()), len(self.correct))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, without the verdict on each image."""
        found = {"error": self.error, "interval": list(self.interval), "images": len(self.correct)}
        return found | {"train_accuracy": self.train_accuracy}

    def pack(self) -> dict[str, Any]:
        """Return all of it as JSON types, the verdicts as the bits of a hexadecimal text."""
        return self.to_dict() | {"correct": np.packbits(self.correct.numpy()).tobytes().hex()}

    @classmethod
    def unpack(cls, found: Mapping[str, Any]) -> NetError:
        """Return what ``pack`` gave."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(found["correct"]), np.uint8), count=found["images"])
        return cls(torch.from_numpy(bits.astype(bool)), found["train_accuracy"])


@dataclass(frozen=True, eq=False, repr=False)
class InducedErrors:
    """The experiment at one checkpoint with one seed.

    Attributes:
        epoch: The checkpoint's epoch.
        seed: Of the new networks and the random starts.
        nets: ``"a"``, ``"b"``, ``"clean"`` and, where asked, ``"zero"``: error of the network trained on that set.
        dispersion: Local dispersion on a sample of ``"a"``, ``"b"`` and ``"test"``, and 0 for ``"zero"`` where asked:
            the numbers of ``analysis.Dispersion``.
        success: Share of ``"a"``, ``"b"`` and ``"test"`` that the checkpoint misclassifies once perturbed.
        gap: The adversarially trained run's own robust generalisation gap in that epoch: robust training accuracy minus
            robust validation accuracy; None where the run was not validated under an attack.
        seconds: Time it took.
    """

    epoch: int
    seed: int
    nets: Mapping[str, NetError]
    dispersion: Mapping[str, Mapping[str, Any]]
    success: Mapping[str, float]
    gap: float | None
    seconds: float

    def difference(self, net: str, reference: str) -> PairedDifference:
        """Return the error of one network minus that of another, with a paired bootstrap over the test images."""
        return paired_bootstrap(~self.nets[net].correct, ~self.nets[reference].correct)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON types: errors, their differences such as ``a_minus_b``, dispersion, success."""
        differences = {f"{a}_minus_{b}": self.difference(a, b).to_dict() for a, b in DIFFERENCES}
        return self._rest() | {"nets": {k: net.to_dict() for k, net in self.nets.items()}} | differences

    def pack(self) -> dict[str, Any]:
        """Return all of it as JSON types."""
        return self._rest() | {"nets": {name: net.pack() for name, net in self.nets.items()}}

    @classmethod
    def unpack(cls, found: Mapping[str, Any]) -> InducedErrors:
        """Return what ``pack`` gave."""
        nets = {name: NetError.unpack(net) for name, net in found["nets"].items()}
        rest = ("epoch", "seed", "dispersion", "success", "gap", "seconds")
        return cls(nets=nets, **{name: found[name] for name in rest})

    def _rest(self) -> dict[str, Any]:
        dispersion = {name: dict(found) for name, found in self.dispersion.items()}
        return {"epoch": self.epoch, "seed": self.seed, "dispersion": dispersion, "success": dict(self.success),
                "gap": self.gap, "seconds": self.seconds}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class InducedDistribution:
    """Result of ``induced_distribution``: a row for each checkpoint and seed, in that order.

    Attributes:
        rows: The results.
        options: What they were measured with.
    """

    rows: tuple[InducedErrors, ...]
    options: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the verdicts on single images, as JSON types."""
        return {"options": dict(self.options), "rows": [row.to_dict() for row in self.rows]}

    def __repr__(self) -> str:
        zero = any("zero" in row.nets for row in self.rows)
        head = f"{'epoch':>5} {'seed':>4} {'IDE_A':>7} {'IDE_B':>7} {'clean':>7}" + f" {'zero':>7}" * zero
        head += f"  {'IDE_A - IDE_B':<22} {'dispersion A':>12} {'B':>8} {'test':>8}" + f" {'gap':>7}"
        lines = [
            f"InducedDistribution: errors and differences in %, {self.rows[0].nets['a'].correct.numel()} test images"
        ]
        return "\n".join([*lines, head, *(self._line(row, zero) for row in self.rows)])

    @staticmethod
    def _line(row: InducedErrors, zero: bool) -> str:
        shown = [name for name in NETS if name != "zero" or zero]
        errors = " ".join(f"{100 * row.nets[name].error:7.2f}" if name in row.nets else " " * 7 for name in shown)
        found = row.difference("a", "b")
        difference = f"{100 * found.mean:+.2f} [{100 * found.interval[0]:+.2f}, {100 * found.interval[1]:+.2f}]"
        spread = [row.dispersion[name]["mean"] for name in SETS]
        gap = "" if row.gap is None else f"{100 * row.gap:7.2f}"
        return (
            f"{row.epoch:>5} {row.seed:>4} {errors}  {difference:<22} {spread[0]:>12.4g} {spread[1]:>8.4g} "
            f"{spread[2]:>8.4g} {gap:>7}"
        ).rstrip()


def finite(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data with None for numbers that JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}
