"""The figure of a sweep over lr / batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from at_extensions.publishing.figures import INK, hue_of, new_figure, percent_axis, styled
from at_extensions.publishing.sweeps import SweepPoint, by_series

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def sweep(points: Sequence[SweepPoint], accuracy: str = "robust accuracy") -> Figure:
    """Draw robust accuracy against lr / batch size, nominal and effective: one hue an optimiser.

    Full markers are held-out data, joined through the mean at each ratio; open ones are training data as attacked.

    Args:
        points: The runs.
        accuracy: Label of the axis.
    """
    from matplotlib.lines import Line2D

    figure = new_figure(3.9)
    panels = figure.subplots(1, 2, sharey=True)
    series = by_series(points)
    for i, group in enumerate(series.values()):
        for axes, key in zip(panels, ("ratio", "effective_ratio")):
            xs = [getattr(p, key) for p in group]
            axes.plot(xs, [p.robust for p in group], "o", color=hue_of(i), markersize=5)
            means = {x: [p.robust for p, at in zip(group, xs) if at == x] for x in dict.fromkeys(xs)}
            axes.plot(list(means), [sum(v) / len(v) for v in means.values()], color=hue_of(i), linewidth=1.2)
            trained = [(x, p.robust_train) for x, p in zip(xs, group) if p.robust_train is not None]
            axes.plot(*zip(*trained), "o", color=hue_of(i), markersize=5, markerfacecolor="none") if trained else None
    titles = {"ratio": "Nominal lr / batch size", "effective_ratio": "Effective lr / batch size"}
    for axes, (key, title) in zip(panels, titles.items()):
        axes.set(title=title, xscale="log")
        ticks = _apart([getattr(p, key) for p in points])
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        percent_axis(axes.yaxis)
    panels[0].set_ylabel(accuracy)
    entries = [Line2D([], [], color=hue_of(i), marker="o", label=name) for i, name in enumerate(series)]
    if any(p.robust_train is not None for p in points):
        entries.append(
            Line2D([], [], color=INK, marker="o", linestyle="", markerfacecolor="none", label="on training data")
        )
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
    return figure


def _apart(values: Sequence[float], least: float = 0.12) -> list[float]:
    """Return those of positive values that are at least a share of their range apart on a logarithmic axis."""
    places = sorted(set(values))
    span = math.log(places[-1] / places[0]) or 1.0
    kept = places[:1]
    for place in places[1:]:
        if math.log(place / kept[-1]) >= least * span:
            kept.append(place)
    return kept
