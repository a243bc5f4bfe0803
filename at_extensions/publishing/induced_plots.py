"""The figure of the induced distribution experiment."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from at_extensions.publishing.figures import INK, hue_of, new_figure, percent_axis, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NETS = {"a": "IDE on A (trained on)", "b": "IDE on B (held out)", "clean": "clean B", "zero": "A, zero start"}
_SETS = {"a": "A", "b": "B", "test": "test"}


@styled
def induced_errors(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the errors of the experiment's networks by epoch, and the dispersion on each set.

    Errors carry Wilson's 95 % interval with one seed, the range over the seeds with several; dispersions carry a
    standard error with one seed, the range with several. The robust gap of the trained run is dashed.

    Args:
        rows: ``InducedDistribution.to_dict()["rows"]``.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(4.2)
    left, right = figure.subplots(1, 2)
    for i, (name, label) in enumerate(_NETS.items()):
        found = [(row["epoch"], row["nets"][name]["error"], row["nets"][name]["interval"])
                 for row in rows if name in row["nets"]]  # fmt: skip
        _draw(left, found, label, hue_of(i))
    gaps = {row["epoch"]: row["gap"] for row in rows if row["gap"] is not None}
    if gaps:
        left.plot(list(gaps), list(gaps.values()), "--", marker="o", color=INK, label="robust gap of the run")
    for i, (name, label) in enumerate(_SETS.items()):
        found = []
        for row in rows:
            mean, error = row["dispersion"][name]["mean"], row["dispersion"][name]["stderr"] or 0.0
            found.append((row["epoch"], mean, (mean - error, mean + error)))
        _draw(right, found, label, hue_of(i))
    left.set(title="Test error", xlabel="epoch of the checkpoint")
    percent_axis(left.yaxis)
    right.set(title="Local dispersion", xlabel="epoch of the checkpoint")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def _draw(axes: Axes, found: Sequence[tuple[int, float, Sequence[float]]], label: str, hue: str) -> None:
    """Draw means over the seeds by epoch, with the interval of a single seed or the range of several."""
    if not found:
        return
    epochs = sorted({epoch for epoch, _, _ in found})
    means, below, above = [], [], []
    for epoch in epochs:
        here = [(value, ends) for e, value, ends in found if e == epoch]
        values = [value for value, _ in here]
        low, high = here[0][1] if len(here) == 1 else (min(values), max(values))
        means.append(statistics.fmean(values))
        below.append(max(0.0, means[-1] - low))
        above.append(max(0.0, high - means[-1]))
    axes.errorbar(epochs, means, yerr=[below, above], color=hue, marker="o", capsize=3, label=label)
