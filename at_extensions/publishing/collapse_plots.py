"""Figures of catastrophic overfitting by injected features: where it happens, and how it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from at_extensions.publishing.figures import FAINT, HUES, INK, new_figure, percent_axis, shorten, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = {
    "train_accuracy": (HUES[1], "training, as the method trains"),
    "val_robust_accuracy": (HUES[0], "validation, under PGD"),
}


@styled
def collapse_map(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw eps x beta for each method: colour is PGD accuracy, a frame and "2/3" say how many runs collapsed.

    Args:
        cells: By method, its cells with ``eps``, ``beta``, ``robust`` (mean accuracy), ``collapsed`` and ``runs``.

    Raises:
        ValueError: No cells.
    """
    if not any(cells.values()):
        raise ValueError("there are no cells to draw")
    rows = sorted({cell["eps"] for part in cells.values() for cell in part}, reverse=True)
    columns = sorted({cell["beta"] for part in cells.values() for cell in part})
    figure = new_figure(1.6 + 0.5 * len(rows) * len(cells) + 0.6 * len(cells))
    panels = figure.subplots(len(cells), 1, squeeze=False)[:, 0]
    for axes, (method, part) in zip(panels, cells.items()):
        values = [[float("nan")] * len(columns) for _ in rows]
        for cell in part:
            values[rows.index(cell["eps"])][columns.index(cell["beta"])] = cell["robust"]
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="none")
        for cell in part:
            _mark(axes, columns.index(cell["beta"]), rows.index(cell["eps"]), cell)
        axes.set_facecolor(FAINT)
        axes.grid(visible=False)
        axes.set_yticks(range(len(rows)), [_steps(eps) for eps in rows])
        axes.set_xticks(range(len(columns)), [_steps(beta) for beta in columns])
        axes.set(title=method, ylabel="eps")
    panels[-1].set_xlabel("beta, amplitude of the injected features; n/m: n of m runs overfitted catastrophically")
    bar = figure.colorbar(image, ax=list(panels), pad=0.01, label="PGD accuracy")
    bar.outline.set_visible(False)
    percent_axis(bar.ax.yaxis)
    return figure


@styled
def collapse_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Draw by epoch, a panel an arm: training accuracy of the method and validation accuracy under PGD, a line a seed.

    Args:
        runs: By arm, the epochs of each of its runs: dicts with ``epoch``, ``train_accuracy``, ``val_robust_accuracy``.

    Raises:
        ValueError: No runs.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    if not runs:
        raise ValueError("there are no runs to draw")
    wide = min(4, len(runs))
    tall = -(-len(runs) // wide)
    figure = new_figure(0.7 + 2.1 * tall)
    panels = figure.subplots(tall, wide, squeeze=False, sharey=True).flat
    for axes, (arm, histories) in zip(panels, runs.items()):
        for key, (hue, _) in _SERIES.items():
            for history in histories:
                points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
                axes.plot([x for x, _ in points], [y for _, y in points], color=hue, linewidth=1.2)
        axes.set_title(shorten(arm, 26), fontsize=8)
        axes.set_xlabel("epoch", fontsize=9)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent_axis(axes.yaxis)
    for axes in figure.axes[len(runs) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], color=hue, label=label) for hue, label in _SERIES.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _mark(axes: Axes, x: int, y: int, cell: Mapping[str, Any]) -> None:
    """Write the number of collapsed runs; frame the cell where there are some."""
    from matplotlib.patches import Rectangle

    light = cell["robust"] > 0.6
    axes.text(x, y, f"{cell['collapsed']}/{cell['runs']}", ha="center", va="center", color=INK if light else "white")
    if cell["collapsed"]:
        axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=HUES[1], linewidth=2.2))


def _steps(value: float) -> str:
    """Return a radius in steps of 1/255."""
    return "0" if value == 0 else f"{round(255 * value, 2):g}/255"
