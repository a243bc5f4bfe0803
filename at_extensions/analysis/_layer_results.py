"""The result of a layer-criticality measurement, with confidence intervals over trials."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

CONFIDENCE = 0.95
"""Confidence level of the intervals, which are Student's t intervals over trials."""


@dataclass(repr=False)
class LayerCriticality:
    """Criticality of each layer of one model; numbers are fractions unless noted otherwise.

    Attributes:
        values: Layer name to its criticality in each trial.
        accuracies: Layer name to the accuracy after each trial's reset; None without labels.
        accuracy: Accuracy of the unchanged model; None without labels.
        divergence: ``"cosine"``, ``"js"`` or ``"kl"``.
        reset: The kind of reset, such as ``"random"``.
        inputs: Name of the attack that made the adversarial examples; None for the images as given.
        n_images: Number of images.
        seed: Trial t used ``seed + t``.
        ci_width: Largest accepted width of an interval, or None.
        exact: Whether the reset is deterministic, so that one trial is exact.
        tied: Layer name to the other layers that share tensors with it and were reset with it.
        whole: Layers whose every reset ran the whole network, because of the memory limit.
        wrapper: Prefix that the model's wrappers add to every layer name, such as ``"network."``.
    """

    values: dict[str, list[float]]
    accuracies: dict[str, list[float]] | None = None
    accuracy: float | None = None
    divergence: str = "cosine"
    reset: str = "random"
    inputs: str | None = None
    n_images: int = 0
    seed: int = 0
    ci_width: float | None = None
    exact: bool = False
    tied: dict[str, list[str]] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    wrapper: str = ""

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the model's order."""
        return list(self.values)

    @functools.cached_property
    def short_names(self) -> dict[str, str]:
        """Layer name to its name without the wrapper prefix, the same in models that are wrapped differently."""
        return {name: name.removeprefix(self.wrapper) for name in self.values}

    @functools.cached_property
    def trials(self) -> dict[str, int]:
        """Layer name to its number of trials."""
        return {name: len(values) for name, values in self.values.items()}

    @functools.cached_property
    def mean(self) -> dict[str, float]:
        """Layer name to its criticality: the mean over trials."""
        return {name: math.fsum(values) / len(values) for name, values in self.values.items()}

    @functools.cached_property
    def std(self) -> dict[str, float]:
        """Layer name to the standard deviation over trials (n - 1 in the denominator); NaN after one random trial."""
        return {name: 0.0 if self.exact else standard_deviation(values) for name, values in self.values.items()}

    @functools.cached_property
    def interval(self) -> dict[str, tuple[float, float]]:
        """Layer name to the 95 % t-interval of the mean, clipped to the possible range; NaN after one random trial."""
        return {name: interval_of(v, self.divergence, self.exact) for name, v in self.values.items()}

    @functools.cached_property
    def accuracy_after(self) -> dict[str, float] | None:
        """Layer name to the accuracy after its reset, the mean over trials; None without labels."""
        if self.accuracies is None:
            return None
        return {name: math.fsum(values) / len(values) for name, values in self.accuracies.items()}

    @property
    def average(self) -> float:
        """Unweighted mean over layers."""
        return math.fsum(self.mean.values()) / len(self.mean)

    @property
    def unsettled(self) -> list[str]:
        """Layers whose interval is still wider than ``ci_width``; empty if ``ci_width`` is None."""
        if self.ci_width is None:
            return []
        return [name for name, (low, high) in self.interval.items() if not high - low <= self.ci_width]

    def stage(self, layer: str) -> str:
        """Return the stage of the network that a layer belongs to: ``"layer1"`` for ``"layer1.0.conv2"``."""
        parts = self.short_names[layer].split(".")
        numbered = re.search(r"\d$", parts[0])
        deep = len(parts) > 2 and re.search(r"\d$", parts[1])
        return ".".join(parts[:2]) if deep and not numbered else parts[0]

    def by_stage(self) -> dict[str, float]:
        """Return the unweighted mean criticality of each stage, in the model's order."""
        stages: dict[str, list[float]] = {}
        for name, value in self.mean.items():
            stages.setdefault(self.stage(name), []).append(value)
        return {stage: math.fsum(values) / len(values) for stage, values in stages.items()}

    def minus(self, other: LayerCriticality) -> dict[str, tuple[float, float, float]]:
        """Return the difference to ``other`` at each common layer: (difference, low, high).

        Low and high are the ends of Welch's 95 % t-interval, NaN after a single trial. Layers are matched and named
        without their wrapper prefix.

        Raises:
            ValueError: No layer in common.
        """
        theirs = {short: name for name, short in other.short_names.items()}
        both = {short: name for name, short in self.short_names.items() if short in theirs}
        if not both:
            raise ValueError(f"no layer in common: {self.layers[0]!r}, ... and {other.layers[0]!r}, ...")
        return {short: self._difference(name, other, theirs[short]) for short, name in both.items()}

    def _difference(self, name: str, other: LayerCriticality, their_name: str) -> tuple[float, float, float]:
        mean = self.mean[name] - other.mean[their_name]
        parts = [(r.std[n] ** 2 / r.trials[n], r.trials[n]) for r, n in ((self, name), (other, their_name))]
        variance = sum(part for part, _ in parts)
        freedom = sum(part**2 / (n - 1) for part, n in parts if part > 0 and n > 1)
        half = 0.0 if variance == 0 else _quantile(variance**2 / freedom) * math.sqrt(variance) if freedom else math.nan
        return mean, mean - half, mean + half

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain numbers and strings; ``from_dict`` reads it back."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        layers = [self._row(name) for name in self.layers]
        return given | {"average": self.average, "stages": self.by_stage(), "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerCriticality:
        """Rebuild a result from ``to_dict``."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})

    def _row(self, name: str) -> dict[str, Any]:
        low, high = self.interval[name]
        return {
            "layer": name,
            "stage": self.stage(name),
            "criticality": self.mean[name],
            "std": _or_none(self.std[name]),
            "low": _or_none(low),
            "high": _or_none(high),
            "trials": self.trials[name],
            "accuracy_after": None if self.accuracies is None else self.accuracy_after[name],
            "settled": name not in self.unsettled,
        }

    def __repr__(self) -> str:
        on = "images" if self.inputs is None else f"adversarial images ({self.inputs})"
        scale, unit = (1, "nats") if self.divergence == "kl" else (100, "%")
        head = f"Layer criticality ({self.divergence}, {unit}; reset {self.reset}) on {self.n_images} {on}: "
        head += f"average {scale * self.average:.2f}"
        head += "" if self.accuracy is None else f"; accuracy {100 * self.accuracy:.2f} %"
        width = max(len(name) for name in self.layers) + 1
        title = f"{'layer':<{width}}{'mean':>7}{'std':>7}   {'95 % interval':<16}{'trials':>6}"
        lines = [head, title + ("" if self.accuracies is None else f"{'accuracy after':>16}")]
        for name in self.layers:
            low, high = (scale * end for end in self.interval[name])
            interval = "unknown" if math.isnan(low) else f"{low:.2f} to {high:.2f}"
            mark = ("*" if name in self.unsettled else "") + ("=" if name in self.tied else "")
            line = f"{name + mark:<{width}}{scale * self.mean[name]:>7.2f}{scale * self.std[name]:>7.2f}   "
            line += f"{interval:<16}{self.trials[name]:>6}"
            lines.append(line + ("" if self.accuracies is None else f"{100 * self.accuracy_after[name]:>16.2f}"))
        if self.unsettled:
            lines.append(f"* interval wider than {scale * self.ci_width:g}")
        lines += [f"= {name} shares tensors with {', '.join(others)}" for name, others in self.tied.items()]
        return "\n".join(line.rstrip() for line in lines)


def standard_deviation(values: Sequence[float]) -> float:
    """Return the standard deviation with n - 1 in the denominator; NaN for one value."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def half_width(std: float, n: int) -> float:
    """Return half the width of a 95 % t-interval of the mean of n values; NaN for one value."""
    return _quantile(n - 1) * std / math.sqrt(n) if n > 1 else math.nan


def _quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def interval_of(values: Sequence[float], divergence: str, exact: bool = False) -> tuple[float, float]:
    """Return the 95 % t-interval of the mean, clipped to the range of the divergence; NaN after one random trial."""
    mean = math.fsum(values) / len(values)
    half = 0.0 if exact else half_width(standard_deviation(values), len(values))
    if math.isnan(half):
        return math.nan, math.nan
    return max(mean - half, 0.0), mean + half if divergence == "kl" else min(mean + half, 1.0)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
