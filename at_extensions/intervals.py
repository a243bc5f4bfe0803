"""Intervals: Wilson's of a proportion, Student's of paired differences, and a paired bootstrap over samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from at_extensions.checks import check_count, check_number

__all__ = ["PairedDifference", "paired_bootstrap", "paired_interval", "wilson_interval"]

_BLOCK = 2**24  # random counts drawn at a time: 128 MB


@dataclass(frozen=True)
class PairedDifference:
    """A difference of two arms and its interval.

    Attributes:
        seeds: The seeds that both arms have, in ascending order; empty for a bootstrap over samples.
        differences: Arm minus reference for each of ``seeds``.
        mean: Mean difference; None where no seed is shared.
        interval: Lower and upper end; None for fewer than two seeds.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float | None
    interval: tuple[float, float] | None

    @property
    def differs(self) -> bool | None:
        """Whether the interval excludes 0; None without an interval."""
        return None if self.interval is None else not self.interval[0] <= 0 <= self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as JSON types, as ``summary.json`` holds it."""
        pairs = {"seeds": list(self.seeds), "differences": list(self.differences)}
        if self.mean is None:
            return pairs
        interval = None if self.interval is None else list(self.interval)
        return pairs | {"mean": self.mean, "interval": interval, "differs": self.differs}

    def __repr__(self) -> str:
        if self.mean is None:
            return "PairedDifference: no seed in common"
        text = f"{self.mean:+.4f}"
        if self.interval is not None:
            text += f" [{self.interval[0]:+.4f}, {self.interval[1]:+.4f}]"
        return f"PairedDifference: {text}" + (f", {len(self.seeds)} seeds" if self.seeds else "")


def wilson_interval(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927), at 95 % with this ``z``.

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    p, square = successes / total, z * z / total
    middle, half = p + square / 2, z * math.sqrt(p * (1 - p) / total + square / (4 * total))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def paired_interval(
    values: Mapping[int, float], reference: Mapping[int, float], *, confidence: float = 0.95
) -> PairedDifference:
    """Return the mean difference of two arms over their common seeds, with Student's interval.

    For n differences with mean m and standard deviation s: m +- t(n - 1) s / sqrt(n). It assumes that the differences
    are roughly normal, and it covers the randomness of training alone: all seeds share one test set.

    Args:
        values: Seed -> value of the arm.
        reference: Seed -> value of the arm that it is compared with.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: A confidence outside (0, 1).
    """
    from scipy.stats import t

    check_number("confidence", confidence, above=0, below=1)
    seeds = tuple(sorted(values.keys() & reference.keys()))
    differences = tuple(values[seed] - reference[seed] for seed in seeds)
    if not seeds:
        return PairedDifference(seeds, differences, None, None)
    mean = statistics.fmean(differences)
    if len(seeds) == 1:
        return PairedDifference(seeds, differences, mean, None)
    quantile = float(t.ppf((1 + confidence) / 2, len(seeds) - 1))
    half = quantile * statistics.stdev(differences) / len(seeds) ** 0.5
    return PairedDifference(seeds, differences, mean, (mean - half, mean + half))


def paired_bootstrap(
    values: Sequence[float] | Tensor,
    reference: Sequence[float] | Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Return the mean difference of two models on the same samples, with the percentile interval of a paired bootstrap.

    Samples are drawn with replacement, and both models are judged on each drawn sample (Efron 1979), so what makes a
    sample hard for both cancels. It covers the choice of test samples, not the randomness of training, for which
    ``paired_interval`` over seeds is meant. With few samples (about 50 or fewer) the interval is too narrow.

    Args:
        values: One number or verdict (bool) a sample (N,), such as ``RobustnessReport.robust``.
        reference: The same samples' numbers under the other model (N,).
        confidence: Coverage of the interval, in (0, 1).
        resamples: Bootstrap samples.
        seed: Of the draws: the same call gives the same interval.

    Raises:
        ValueError: Different lengths, no samples, numbers that are not finite, or a confidence outside (0, 1).
    """
    check_number("confidence", confidence, above=0, below=1)
    check_count("resamples", resamples)
    a, b = (np.asarray(v, dtype=np.float64) for v in (values, reference))
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise ValueError(
            f"a paired bootstrap needs one number a sample for the same samples, got shapes {a.shape}, {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a paired bootstrap needs finite numbers")
    # Equal differences are drawn together: how often each occurs among N draws is multinomial.
    differences, counts = np.unique(a - b, return_counts=True)
    generator, block = np.random.default_rng(seed), max(1, _BLOCK // len(differences))
    means = np.concatenate(
        [
            generator.multinomial(len(a), counts / len(a), min(block, resamples - start)) @ differences / len(a)
            for start in range(0, resamples, block)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return PairedDifference((), (), float((a - b).mean()), (low, high))
