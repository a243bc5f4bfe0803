"""Figures of runs: training curves, accuracies, accuracy after each attack and by class, adversarial examples.

Each function returns a ``matplotlib.figure.Figure``; ``figures.to_svg`` and ``to_png`` turn one into text for a page.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from at_extensions.publishing.figures import (
    HUES,
    INK,
    colour_key,
    hue_of,
    new_figure,
    percent_axis,
    shorten,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from at_extensions.analysis import RobustOverfitting


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return the epochs that measured ``key``, and its values."""
    points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None and row.get("epoch") is not None]
    return [x for x, _ in points], [y for _, y in points]


@styled
def training_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], overfitting: Mapping[str, RobustOverfitting] | None = None
) -> Figure:
    """Draw accuracy and loss by epoch: one hue a run, one line style a quantity.

    Args:
        histories: By run, its epochs: dicts with ``epoch`` and any of ``train_loss``, ``train_accuracy``,
            ``val_clean_accuracy``, ``val_robust_accuracy`` (fractions).
        overfitting: By run, its robust overfitting: a ring at the best robust accuracy, a line at the onset.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(3.9)
    accuracy, loss = figure.subplots(1, 2, width_ratios=(3, 2))
    styles = {
        "val_robust_accuracy": ("-", "validation, under attack"),
        "val_clean_accuracy": ("--", "validation, clean"),
        "train_accuracy": (":", "training, as the method trains"),
    }
    drawn = set()
    for i, (label, history) in enumerate(histories.items()):
        found = (overfitting or {}).get(label)
        if found is not None:
            ring = {"color": hue_of(i), "markersize": 9, "markerfacecolor": "none", "linestyle": ""}
            accuracy.plot([found.best_epoch], [found.best], "o", **ring)
            if found.onset is not None:
                accuracy.axvline(found.onset, color=hue_of(i), linewidth=0.9, linestyle=(0, (4, 3)))
        for key, (style, _) in styles.items():
            epochs, values = _series(history, key)
            if epochs:
                accuracy.plot(epochs, values, style, color=hue_of(i), marker="o" if len(epochs) < 16 else None)
                drawn.add(key)
        epochs, values = _series(history, "train_loss")
        loss.plot(epochs, values, color=hue_of(i), marker="o" if len(epochs) < 16 else None)
    accuracy.set(title="Accuracy", xlabel="epoch", ylim=(0, 1.02))
    loss.set(title="Training loss", xlabel="epoch")
    loss.set_ylim(bottom=0)
    percent_axis(accuracy.yaxis)
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    entries = [Line2D([], [], color=hue_of(i), label=shorten(name)) for i, name in enumerate(histories)]
    entries += [Line2D([], [], color=INK, linestyle=styles[k][0], label=styles[k][1]) for k in styles if k in drawn]
    figure.legend(handles=entries, loc="outside lower center", ncols=3)
    return figure


@styled
def accuracy_bars(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw clean and robust accuracy of each run, robust accuracy with its 95 % interval.

    Args:
        reports: By run, a ``RobustnessReport.to_dict()``.
    """
    figure = new_figure(0.9 + 0.75 * len(reports))
    axes = figure.subplots()
    for row, values in enumerate(reports.values()):
        bars = ((-0.19, "clean_accuracy", HUES[5], None), (0.19, "robust_accuracy", HUES[0], interval_of(values)))
        for offset, key, hue, interval in bars:
            value = values[key]
            error = None if interval is None else [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]
            axes.barh(row + offset, value, 0.34, color=hue, xerr=error, ecolor=INK, error_kw={"capsize": 3})
            end = value if interval is None else max(value, interval[1])
            axes.text(end + 0.01, row + offset, f"{100 * value:.1f} %", va="center", fontsize=9)
    axes.set_yticks(range(len(reports)), [shorten(name) for name in reports])
    axes.set(xlim=(0, 1.1), ylim=(len(reports) - 0.5, -0.5), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.grid(axis="y", visible=False)
    percent_axis(axes.xaxis)
    colour_key(figure, {"clean accuracy": HUES[5], "robust accuracy, with 95 % interval": HUES[0]})
    return figure


def interval_of(values: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of robust accuracy that a report's dict holds, or None."""
    interval = values.get("interval")
    return None if not interval else (float(interval[0]), float(interval[1]))


@styled
def after_attack(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the accuracy that is left after each attack of the suite, in the order they ran.

    Args:
        reports: By run, a ``RobustnessReport.to_dict()`` with ``after_attack``: attack -> accuracy left.
    """
    steps = ["clean", *attacks_of(reports)]
    figure = new_figure(3.2)
    axes = figure.subplots()
    for i, (run, values) in enumerate(reports.items()):
        left = {"clean": values["clean_accuracy"], **values["after_attack"]}
        heights = [left[step] for step in steps if step in left]
        places = [x for x, step in enumerate(steps) if step in left]
        axes.plot(places, heights, color=hue_of(i), marker="osD^vP"[i % 6], markersize=6, label=shorten(run))
    axes.set_xticks(range(len(steps)), ["clean", *(f"after {step}" for step in steps[1:])])
    axes.set(ylim=(0, 1.04), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    percent_axis(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=min(3, len(reports)))
    return figure


def attacks_of(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every attack that some report ran, in order."""
    return list(dict.fromkeys(name for values in reports.values() for name in values["after_attack"]))


@styled
def per_class_bars(reports: Mapping[str, Mapping[str, Any]], class_names: Sequence[str] | None = None) -> Figure:
    """Draw clean and robust accuracy by class, one panel a run; counts are written below where classes differ in size.

    Args:
        reports: By run, a ``RobustnessReport.to_dict()`` with ``per_class``: dicts of ``class``, ``count``, ``clean``,
            ``robust`` and, where the training set was long-tailed, ``train_count``.
        class_names: Labels of the bars; the class numbers if None.
    """
    figure = new_figure(0.8 + 2.2 * len(reports))
    panels = figure.subplots(len(reports), 1, squeeze=False, sharey=True)[:, 0]
    for axes, (run, values) in zip(panels, reports.items()):
        _class_panel(axes, values["per_class"], class_names)
        axes.set_title(shorten(run, 80))
    colour_key(figure, {"clean": HUES[5], "robust": HUES[0]})
    return figure


def _class_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], class_names: Sequence[str] | None) -> None:
    key = "train_count" if rows and rows[0].get("train_count") is not None else "count"
    few = len(rows) <= 20
    if not few and key == "train_count":
        rows = sorted(rows, key=lambda row: -row[key])
    places = range(len(rows))
    for part, hue, width in (("clean", HUES[5], 0.84), ("robust", HUES[0], 0.5)):
        axes.bar(places, [row[part] or 0.0 for row in rows], width, color=hue)
    counts = [row[key] for row in rows]
    uneven = bool(counts) and min(counts) < 0.8 * max(counts)
    if few:
        names = [_class_name(row["class"], class_names) for row in rows]
        axes.set_xticks(places, [f"{n}\nn={c}" if uneven else n for n, c in zip(names, counts)], fontsize=9)
        axes.tick_params(axis="x", length=0)
    elif key == "train_count":
        axes.set_xlabel("classes, from the most frequent in training to the rarest")
        beside = axes.twinx()
        beside.plot(places, counts, color=HUES[1], linewidth=1.2)
        beside.set(ylabel="training images", ylim=(0, None))
        beside.grid(visible=False)
    else:
        axes.set_xlabel("class")
    axes.set(ylim=(0, 1.02))
    axes.grid(axis="x", visible=False)
    percent_axis(axes.yaxis)


def _class_name(number: int, class_names: Sequence[str] | None) -> str:
    return str(number) if class_names is None else shorten(str(class_names[number]), 12)


@styled
def triples(examples: Mapping[str, Tensor], count: int = 6, class_names: Sequence[str] | None = None) -> Figure:
    """Draw images, the amplified perturbation and the adversarial images below each other, with predictions.

    The perturbation is shown as ``0.5 + gain * (adversarial - image)``; the gain, one for all, is written beside it.

    Args:
        examples: ``images`` and ``adversarial`` (N, C, H, W) in [0, 1], ``labels``, ``clean_predictions`` and
            ``adversarial_predictions`` (N,).
        count: How many to draw at most, from the first.
        class_names: Names to write in place of class numbers.
    """
    columns = min(count, len(examples["images"]))
    images, adversarial = (examples[key][:columns].float().cpu() for key in ("images", "adversarial"))
    perturbation = adversarial - images
    gain = gain_of(perturbation)
    labels, before, after = (
        examples[key][:columns].tolist() for key in ("labels", "clean_predictions", "adversarial_predictions")
    )
    name = functools.partial(_class_name, class_names=class_names)
    figure = new_figure(5.0)
    grid = figure.subplots(3, max(columns, 4), squeeze=False)
    shown = (images, (0.5 + gain * perturbation).clamp(0, 1), adversarial)
    for row, batch in enumerate(shown):
        for column in range(grid.shape[1]):
            axes = grid[row, column]
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            if column < columns:
                _show(axes, batch[column])
    for i in range(columns):
        grid[0, i].set_title(f"label {name(labels[i])}", loc="center", fontsize=10)
        for axes, prediction in ((grid[0, i], before[i]), (grid[2, i], after[i])):
            right = prediction == labels[i]
            axes.set_xlabel(f"{'✓' if right else '✗'} says {name(prediction)}", color=HUES[0] if right else HUES[1])
    for axes, text in zip(grid[:, 0], ("image", f"perturbation\n× {gain:g}", "adversarial\nimage")):
        axes.set_ylabel(text, fontweight="bold")
    return figure


def gain_of(perturbation: Tensor) -> float:
    """The factor, to two figures and rounded down, at which the largest change of a pixel spans half the grey scale."""
    largest = float(perturbation.abs().max()) if perturbation.numel() else 0.0
    if largest == 0:
        return 1.0
    gain = 0.5 / largest
    scale = 10 ** (len(str(int(gain))) - 2)
    return int(gain / scale + 1e-4) * scale  # 0.5 / 0.2 is 2.4999 in single precision


def _show(axes: Axes, image: Tensor) -> None:
    """Draw one image (C, H, W); one channel is grey, of more than three the first three are shown."""
    pixels = image[:1].expand(3, -1, -1) if len(image) < 3 else image[:3]
    axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="none")
