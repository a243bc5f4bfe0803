"""Figures of layer criticality: against depth, models x layers, the difference of two, by stage, against eps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from at_extensions.analysis import LayerCriticality
from at_extensions.publishing.figures import FAINT, HUES, INK, hue_of, new_figure, shorten, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, LayerCriticality]
"""Results by model."""

_MAX_NAMES = 64  # layers whose names still fit beside each other


@styled
def depth_curves(results: Results) -> Figure:
    """Draw criticality by layer, from the first to the last, with 95 % intervals where they are known.

    Models of one architecture share an axis of layers; otherwise layers are placed at their relative depth.

    Raises:
        ValueError: No results, or different divergences.
    """
    unit = _check(results)
    figure = new_figure(4.6)
    axes = figure.subplots()
    layers = _common_layers(results)
    for i, (model, result) in enumerate(results.items()):
        n = len(result.layers)
        places = list(range(n)) if layers else [k / max(n - 1, 1) for k in range(n)]
        axes.plot(places, list(result.mean.values()), color=hue_of(i), marker="osD^vP"[i % 6], label=shorten(model))
        low, high = zip(*result.interval.values())
        axes.fill_between(places, low, high, color=hue_of(i), alpha=0.16, linewidth=0)
    if layers:
        _mark_stages(axes, next(iter(results.values())))
    else:
        axes.set_xlabel("relative depth of the layer")
    axes.set(title="Layer criticality by depth", ylabel=f"criticality {unit}")
    _value_axis(axes, results)
    figure.legend(loc="outside lower center", ncols=min(3, len(results)))
    return figure


@styled
def heat_map(results: Results) -> Figure:
    """Draw models x layers; a layer that a model does not have is left grey.

    Raises:
        ValueError: No results, or different divergences.
    """
    unit = _check(results)
    columns = list(dict.fromkeys(name for result in results.values() for name in _short_names(result)))
    values = [[_short_names(r).get(column, math.nan) for column in columns] for r in results.values()]
    figure = new_figure(2.6 + 0.36 * len(results))
    axes = figure.subplots()
    top = None if _unbounded(results) else 1.0
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="none")
    axes.set_facecolor(FAINT)
    axes.grid(visible=False)
    axes.set_yticks(range(len(results)), [shorten(model) for model in results])
    if len(columns) <= _MAX_NAMES:
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    else:
        axes.set_xlabel("layer, from first to last")
    axes.set_title("Layer criticality")
    bar = figure.colorbar(image, ax=axes, pad=0.01, label=f"criticality {unit}")
    bar.outline.set_visible(False)
    if not _unbounded(results):
        _percent(bar.ax.yaxis)
    return figure


@styled
def difference_bars(first: LayerCriticality, second: LayerCriticality, names: Sequence[str] = ("A", "B")) -> Figure:
    """Draw by how much ``second`` exceeds ``first`` at each layer that both have, with 95 % Welch intervals.

    Args:
        first: The subtrahend.
        second: The minuend.
        names: Their names.

    Raises:
        ValueError: They have no layer in common, or were measured by different divergences.
    """
    results = dict(zip(("first", "second"), (first, second)))
    unit = _check(results)
    moved = second.minus(first)
    figure = new_figure(4.4)
    axes = figure.subplots()
    for place, (mean, low, high) in enumerate(moved.values()):
        axes.bar(place, mean, 0.8, color=HUES[1] if mean > 0 else HUES[0])
        if not math.isnan(low):
            axes.plot([place, place], [low, high], color=INK, linewidth=0.9)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(title=f"{shorten(names[1])} minus {shorten(names[0])}", ylabel=f"difference in criticality {unit}")
    _mark_stages(axes, LayerCriticality({name: [0.0] for name in moved}))
    if not _unbounded(results):
        _percent(axes.yaxis)
    return figure


@styled
def stage_bars(results: Results) -> Figure:
    """Draw the mean of each stage as a bar, and its layers as dots.

    Raises:
        ValueError: No results, or different divergences.
    """
    unit = _check(results)
    stages = list(dict.fromkeys(stage for result in results.values() for stage in result.by_stage()))
    figure = new_figure(4.2)
    axes = figure.subplots()
    width = 0.8 / len(results)
    for i, (model, result) in enumerate(results.items()):
        shift = (i - (len(results) - 1) / 2) * width
        means = result.by_stage()
        places = [stages.index(stage) + shift for stage in means]
        axes.bar(places, list(means.values()), 0.92 * width, color=hue_of(i), label=shorten(model))
        dots = [stages.index(result.stage(name)) + shift for name in result.layers]
        axes.plot(dots, list(result.mean.values()), ".", color=INK, markersize=3, alpha=0.6)
    crowded = len(stages) > 10
    axes.set_xticks(range(len(stages)), stages, rotation=90 if crowded else 0, fontsize=8 if crowded else 10)
    axes.grid(axis="x", visible=False)
    axes.set(title="Layer criticality by stage (dots are layers)", ylabel=f"criticality {unit}")
    _value_axis(axes, results)
    figure.legend(loc="outside lower center", ncols=min(3, len(results)))
    return figure


@styled
def eps_curves(results: Results, eps: Mapping[str, float]) -> Figure:
    """Draw the average over layers and the mean of each stage against the radius that a model was trained for.

    Args:
        results: Results by model, of one architecture.
        eps: By model, its radius in [0, 1]; 0 for standard training.

    Raises:
        ValueError: No results, different divergences, or a model without eps.
    """
    unit = _check(results)
    missing = [model for model in results if model not in eps]
    if missing:
        raise ValueError(f"eps is missing for {missing[0]!r}; use 0 for standard training")
    order = sorted(results, key=lambda model: eps[model])
    places = [255 * eps[model] for model in order]
    figure = new_figure(4.2)
    axes = figure.subplots()
    for i, stage in enumerate(results[order[0]].by_stage()):
        points = [(x, results[m].by_stage().get(stage)) for x, m in zip(places, order)]
        points = [(x, y) for x, y in points if y is not None]
        axes.plot(*zip(*points), color=hue_of(i), marker="osD^vP"[i % 6], linewidth=1.2, label=stage)
    axes.plot(places, [results[m].average for m in order], color=INK, marker="o", linewidth=2.4, label="all layers")
    axes.set(title="Layer criticality against the training radius", xlabel="eps x 255", ylabel=f"criticality {unit}")
    _value_axis(axes, results)
    figure.legend(loc="outside right center")
    return figure


@styled
def _check(results: Results) -> str:
    """Return the unit of the measure."""
    kinds = {result.divergence for result in results.values()}
    if not results:
        raise ValueError("no results to draw")
    if len(kinds) > 1:
        raise ValueError(f"results of different divergences cannot be compared: {sorted(kinds)}")
    return {"cosine": "(1 - cosine)", "js": "(Jensen-Shannon, bits)", "kl": "(KL, nats)"}[kinds.pop()]


def _unbounded(results: Results) -> bool:
    return any(result.divergence == "kl" for result in results.values())


def _percent(axis) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def _value_axis(axes: Axes, results: Results) -> None:
    if _unbounded(results):
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylim(0, 1.02)
        _percent(axes.yaxis)


def _common_layers(results: Results) -> list[str] | None:
    """The layers of all models where they are the same."""
    names = [list(_short_names(result)) for result in results.values()]
    return names[0] if all(other == names[0] for other in names) else None


def _short_names(result: LayerCriticality) -> dict[str, float]:
    """Criticality by layer name without wrappers, so that models wrapped differently meet."""
    return {result.short_names[name]: value for name, value in result.mean.items()}


def _mark_stages(axes: Axes, result: LayerCriticality) -> None:
    """Name stages below the axis and draw lines between them."""
    stages = [result.stage(name) for name in result.layers]
    starts = [i for i, stage in enumerate(stages) if i == 0 or stages[i - 1] != stage]
    ends = [*starts[1:], len(stages)]
    centres = [(start + end - 1) / 2 for start, end in zip(starts, ends)]
    crowded = len(starts) > 10
    axes.set_xticks(centres, [stages[i] for i in starts], rotation=90 if crowded else 0, fontsize=8 if crowded else 9)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=FAINT, linewidth=0.8)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.6, len(stages) - 0.4)
