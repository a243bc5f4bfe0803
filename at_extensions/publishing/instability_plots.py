"""The figure of gradient instability along a direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from at_extensions.publishing.figures import INK, hue_of, logarithmic, new_figure, shorten, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from at_extensions.analysis import GradientInstability


@styled
def instability_curves(results: Mapping[str, GradientInstability]) -> Figure:
    """Draw change and cosine of the gradient against the step length: one hue a model, dashed with a frozen attack.

    Args:
        results: By model, its gradient instability.
    """
    from matplotlib.lines import Line2D

    figure = new_figure(3.9)
    panels = figure.subplots(1, 2)
    for i, found in enumerate(results.values()):
        for curve, style in ((found.recomputed, "-"), (found.frozen, "--")):
            if curve is not None:
                panels[0].plot(found.steps, curve.change, style, color=hue_of(i), marker="o")
                panels[1].plot(found.steps, curve.cosine, style, color=hue_of(i), marker="o")
    panels[0].set(title="|G(s) - G(0)| / |G(0)|", xlabel="step length s / lr")
    panels[0].set_ylim(bottom=0)
    panels[1].set(title="cosine of G(s) and G(0)", xlabel="step length s / lr")
    steps = sorted({s for found in results.values() for s in found.steps})
    if steps[0] > 0:
        for axes in panels:
            logarithmic(axes, steps)
    entries = [Line2D([], [], color=hue_of(i), label=shorten(name)) for i, name in enumerate(results)]
    entries += [
        Line2D([], [], color=INK, linestyle=s, label=t) for s, t in (("-", "attack recomputed"), ("--", "frozen"))
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
    return figure
