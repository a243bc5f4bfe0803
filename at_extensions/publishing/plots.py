"""Figures of runs: training curves, sweeps, accuracies, accuracy after each attack and by class, adversarial examples.

Each function returns a ``matplotlib.figure.Figure`` made without pyplot; ``to_svg`` and ``to_png`` turn one into text
for a page. The user's rcParams are neither read nor changed, nor is their backend.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from at_extensions.publishing.sweeps import SweepPoint, by_series
from at_extensions.runs import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any common colour blindness; a page may set its own as --hue-1, --hue-2, ...
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK = "#1c2127"  # becomes currentColor in a page
_FAINT = "#d3d6da"  # becomes the page's --line
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _FAINT,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.edgecolor": "none",
    "text.color": _INK,
    "text.parse_math": False,  # a run may be called "$x"
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "at-extensions",  # the same figure gives the same text
    "svg.image_inline": True,
}
_WIDTH = 9.6  # inches; 72 to an inch in SVG


def _styled(function: Callable) -> Callable:
    """Run ``function`` in our style, whatever the user's is, and put theirs back."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        import matplotlib.style

        with matplotlib.style.context(["default", _STYLE]):
            return function(*args, **kwargs)

    return run


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _hue(index: int) -> str:
    return HUES[index % len(HUES)]


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The epochs that measured ``key``, and what they measured."""
    points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None and row.get("epoch") is not None]
    return [x for x, _ in points], [y for _, y in points]


def _shorten(text: str, limit: int = 34) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


@_styled
def training_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw accuracy and loss by epoch: one hue a run, one line style a quantity.

    Args:
        histories: By run, its epochs: dicts with ``epoch`` and any of ``train_loss``, ``train_accuracy``,
            ``val_clean_accuracy``, ``val_robust_accuracy`` (fractions).
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = _figure(3.9)
    accuracy, loss = figure.subplots(1, 2, width_ratios=(3, 2))
    styles = {
        "val_robust_accuracy": ("-", "validation, under attack"),
        "val_clean_accuracy": ("--", "validation, clean"),
        "train_accuracy": (":", "training, as the method trains"),
    }
    drawn = set()
    for i, history in enumerate(histories.values()):
        for key, (style, _) in styles.items():
            epochs, values = _series(history, key)
            if epochs:
                accuracy.plot(epochs, values, style, color=_hue(i), marker="o" if len(epochs) < 16 else None)
                drawn.add(key)
        epochs, values = _series(history, "train_loss")
        loss.plot(epochs, values, color=_hue(i), marker="o" if len(epochs) < 16 else None)
    accuracy.set(title="Accuracy", xlabel="epoch", ylim=(0, 1.02))
    loss.set(title="Training loss", xlabel="epoch")
    loss.set_ylim(bottom=0)
    _percent_axis(accuracy.yaxis)
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    entries = [Line2D([], [], color=_hue(i), label=_shorten(name)) for i, name in enumerate(histories)]
    entries += [Line2D([], [], color=_INK, linestyle=styles[k][0], label=styles[k][1]) for k in styles if k in drawn]
    figure.legend(handles=entries, loc="outside lower center", ncols=3)
    return figure


@_styled
def accuracy_bars(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw clean and robust accuracy of each run, robust accuracy with its 95 % interval.

    Args:
        reports: By run, a ``RobustnessReport.to_dict()``.
    """
    figure = _figure(0.9 + 0.75 * len(reports))
    axes = figure.subplots()
    for row, values in enumerate(reports.values()):
        bars = ((-0.19, "clean_accuracy", HUES[5], None), (0.19, "robust_accuracy", HUES[0], interval_of(values)))
        for offset, key, hue, interval in bars:
            value = values[key]
            error = None if interval is None else [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]
            axes.barh(row + offset, value, 0.34, color=hue, xerr=error, ecolor=_INK, error_kw={"capsize": 3})
            end = value if interval is None else max(value, interval[1])
            axes.text(end + 0.01, row + offset, f"{100 * value:.1f} %", va="center", fontsize=9)
    axes.set_yticks(range(len(reports)), [_shorten(name) for name in reports])
    axes.set(xlim=(0, 1.1), ylim=(len(reports) - 0.5, -0.5), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.grid(axis="y", visible=False)
    _percent_axis(axes.xaxis)
    _key(figure, {"clean accuracy": HUES[5], "robust accuracy (AutoAttack), with 95 % interval": HUES[0]})
    return figure


@_styled
def sweep(points: Sequence[SweepPoint], accuracy: str = "robust accuracy") -> Figure:
    """Draw robust accuracy against lr / batch size, nominal and effective: one hue an optimiser.

    Full markers are held-out data, joined through the mean at each ratio; open ones are training data as attacked.

    Args:
        points: The runs.
        accuracy: What the axis says.
    """
    from matplotlib.lines import Line2D

    figure = _figure(3.9)
    panels = figure.subplots(1, 2, sharey=True)
    series = by_series(points)
    for i, group in enumerate(series.values()):
        for axes, key in zip(panels, ("ratio", "effective_ratio")):
            xs = [getattr(p, key) for p in group]
            axes.plot(xs, [p.robust for p in group], "o", color=_hue(i), markersize=5)
            means = {x: [p.robust for p, at in zip(group, xs) if at == x] for x in dict.fromkeys(xs)}
            axes.plot(list(means), [sum(v) / len(v) for v in means.values()], color=_hue(i), linewidth=1.2)
            trained = [(x, p.robust_train) for x, p in zip(xs, group) if p.robust_train is not None]
            axes.plot(*zip(*trained), "o", color=_hue(i), markersize=5, markerfacecolor="none") if trained else None
    titles = {"ratio": "Nominal lr / batch size", "effective_ratio": "Effective lr / batch size"}
    for axes, (key, title) in zip(panels, titles.items()):
        axes.set(title=title, xscale="log")
        ticks = _apart([getattr(p, key) for p in points])
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        _percent_axis(axes.yaxis)
    panels[0].set_ylabel(accuracy)
    entries = [Line2D([], [], color=_hue(i), marker="o", label=name) for i, name in enumerate(series)]
    if any(p.robust_train is not None for p in points):
        entries.append(
            Line2D([], [], color=_INK, marker="o", linestyle="", markerfacecolor="none", label="on training data")
        )
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
    return figure


def _apart(values: Sequence[float], least: float = 0.12) -> list[float]:
    """Those of positive values that stand at least a share of their range apart on a logarithmic axis."""
    places = sorted(set(values))
    span = math.log(places[-1] / places[0]) or 1.0
    kept = places[:1]
    for place in places[1:]:
        if math.log(place / kept[-1]) >= least * span:
            kept.append(place)
    return kept


def _key(figure: Figure, entries: Mapping[str, str]) -> None:
    """A legend of colours under the figure."""
    from matplotlib.patches import Patch

    handles = [Patch(color=hue, label=label) for label, hue in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def interval_of(values: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of robust accuracy that a report's dict holds, or None."""
    interval = values.get("interval")
    return None if not interval else (float(interval[0]), float(interval[1]))


@_styled
def after_attack(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the accuracy that is left after each attack of the suite, in the order they ran.

    Args:
        reports: By run, a ``RobustnessReport.to_dict()`` with ``after_attack``: attack -> accuracy left.
    """
    steps = ["clean", *attacks_of(reports)]
    figure = _figure(3.2)
    axes = figure.subplots()
    for i, (run, values) in enumerate(reports.items()):
        left = {"clean": values["clean_accuracy"], **values["after_attack"]}
        heights = [left[step] for step in steps if step in left]
        places = [x for x, step in enumerate(steps) if step in left]
        axes.plot(places, heights, color=_hue(i), marker="osD^vP"[i % 6], markersize=6, label=_shorten(run))
    axes.set_xticks(range(len(steps)), ["clean", *(f"after {step}" for step in steps[1:])])
    axes.set(ylim=(0, 1.04), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    _percent_axis(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=min(3, len(reports)))
    return figure


def attacks_of(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every attack that some report ran, in order."""
    return list(dict.fromkeys(name for values in reports.values() for name in values["after_attack"]))


@_styled
def per_class_bars(reports: Mapping[str, Mapping[str, Any]], class_names: Sequence[str] | None = None) -> Figure:
    """Draw clean and robust accuracy by class, one panel a run; counts stand below where classes differ in size.

    Args:
        reports: By run, a ``RobustnessReport.to_dict()`` with ``per_class``: dicts of ``class``, ``count``, ``clean``,
            ``robust`` and, where the training set was long-tailed, ``train_count``.
        class_names: What to write under the bars; the class numbers if None.
    """
    figure = _figure(0.8 + 2.2 * len(reports))
    panels = figure.subplots(len(reports), 1, squeeze=False, sharey=True)[:, 0]
    for axes, (run, values) in zip(panels, reports.items()):
        _class_panel(axes, values["per_class"], class_names)
        axes.set_title(_shorten(run, 80))
    _key(figure, {"clean": HUES[5], "robust": HUES[0]})
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
    _percent_axis(axes.yaxis)


def _class_name(number: int, class_names: Sequence[str] | None) -> str:
    return str(number) if class_names is None else _shorten(str(class_names[number]), 12)


@_styled
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
    figure = _figure(5.0)
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


@_styled
def to_svg(figure: Figure, prefix: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element that takes its text and hues from the page around it.

    Args:
        figure: What to render.
        prefix: Put before every id, so that several figures can share a page.
        description: What screen readers say.
    """
    from markupsafe import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # an HTML parser knows them
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = text.replace(_INK, "currentColor").replace(_FAINT, f"var(--line, {_FAINT})")
    for i, hue in enumerate(HUES):
        text = text.replace(hue, f"var(--hue-{i + 1}, {hue})")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page sets the size; viewBox keeps the proportions
    return f'<svg role="img" aria-label="{escape(description)}"{head.removeprefix("<svg")}>{rest}'


@_styled
def to_png(figure: Figure, dpi: int = 144) -> str:
    """Return a figure on white as a ``data:image/png;base64,...`` address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@_styled
def save_png(figure: Figure, path: str | Path, dpi: int = 144) -> Path:
    """Write a figure on white, atomically, and return its path."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor="white")
    return Path(path)
