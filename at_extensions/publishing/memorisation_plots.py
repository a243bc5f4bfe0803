"""The figures of training on random labels: accuracies and gradient instability by rate of label noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from at_extensions.publishing.figures import INK, hue_of, logarithmic, new_figure, percent_axis, shorten, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"train": "Training labels", "flipped": "Flipped labels", "test": "Test, true labels"}


@styled
def memorisation_by_rate(accuracies: Mapping[str, Mapping[float, Sequence[Mapping[str, float]]]], pgd: str) -> Figure:
    """Draw accuracy against the rate of label noise, on training labels, flipped ones and test images.

    One hue a method, full where clean and dashed under PGD; the mean of the seeds, with a band from the lowest to the
    highest.

    Args:
        accuracies: Method -> rate -> for each seed, accuracies by names such as ``last/train/clean``.
        pgd: Name of the attack, such as ``pgd10``.
    """
    figure = new_figure(3.9)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    rates = sorted({rate for by_rate in accuracies.values() for rate in by_rate})
    for axes, (group, title) in zip(panels, PANELS.items()):
        for i, by_rate in enumerate(accuracies.values()):
            for attack, style in (("clean", "-"), (pgd, "--")):
                name = f"last/{group}/{attack}"
                found = {rate: [seed[name] for seed in by_rate.get(rate, ()) if name in seed] for rate in rates}
                _band(axes, {rate: values for rate, values in found.items() if values}, style, hue_of(i))
        axes.set(title=title, xlabel="labels redrawn", ylim=(-0.03, 1.03), xticks=rates)
        percent_axis(axes.xaxis)
        percent_axis(axes.yaxis)
        margin = 0.06 * ((rates[-1] - rates[0]) or 1)
        axes.set_xlim(rates[0] - margin, rates[-1] + margin)
    panels[0].set_ylabel("accuracy, last epoch")
    _legend(figure, list(accuracies), ("clean", f"PGD-{pgd.removeprefix('pgd')}"))
    return figure


@styled
def instability_by_rate(curves: Mapping[float, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Draw the change of the gradient against the step length: a panel a rate of label noise, one hue a method.

    Full with the attack recomputed and dashed with a frozen one, the gap being the attack's share; the mean of the
    seeds, with a band from the lowest to the highest.

    Args:
        curves: Rate -> method -> for each seed, ``GradientInstability.to_dict()``.
    """
    figure = new_figure(3.9)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    methods = list(dict.fromkeys(method for of_rate in curves.values() for method in of_rate))
    for axes, (rate, of_rate) in zip(panels, sorted(curves.items())):
        for method, seeds in of_rate.items():
            for name, style in (("recomputed", "-"), ("frozen", "--")):
                changes = zip(*(seed[name]["change"] for seed in seeds))
                _band(axes, dict(zip(seeds[0]["steps"], changes)), style, hue_of(methods.index(method)))
        axes.set(title=f"{100 * rate:g} % of labels redrawn", xlabel="step length s / lr")
        axes.set_ylim(bottom=0)
        logarithmic(axes, sorted({step for seeds in of_rate.values() for seed in seeds for step in seed["steps"]}))
    panels[0].set_ylabel("|G(s) - G(0)| / |G(0)|")
    _legend(figure, methods, ("attack recomputed", "frozen"))
    return figure


def _band(axes: Axes, values: Mapping[float, Sequence[float]], style: str, hue: str) -> None:
    """Draw the means of values by place, and a band from the lowest to the highest."""
    xs = list(values)
    axes.plot(xs, [sum(v) / len(v) for v in values.values()], style, color=hue, marker="o")
    if any(len(v) > 1 for v in values.values()):
        lows, highs = [min(v) for v in values.values()], [max(v) for v in values.values()]
        axes.fill_between(xs, lows, highs, color=hue, alpha=0.15, linewidth=0)
        axes.vlines(xs, lows, highs, color=hue, linewidth=1.0)


def _legend(figure: Figure, methods: Sequence[str], styles: tuple[str, str]) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=hue_of(i), label=shorten(name)) for i, name in enumerate(methods)]
    entries += [Line2D([], [], color=INK, linestyle=s, label=t) for s, t in zip(("-", "--"), styles)]
    figure.legend(handles=entries, loc="outside lower center", ncols=6)
