"""The house style of figures, the pieces they share, and how they are written.

Figures are made without pyplot; the user's rcParams are neither read nor changed, nor is their backend.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from at_extensions.runs import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinct with any common colour blindness; a page may set its own as --hue-1, --hue-2, ...
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK = "#1c2127"  # becomes currentColor in a page
FAINT = "#d3d6da"  # becomes the page's --line
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.edgecolor": "none",
    "text.color": INK,
    "text.parse_math": False,  # a run may be called "$x"
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "at-extensions",  # the same figure gives the same text
    "svg.image_inline": True,
}
_WIDTH = 9.6  # inches; 72 to an inch in SVG


def styled(function: Callable) -> Callable:
    """Run ``function`` in our style, whatever the user's is, and put theirs back."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        import matplotlib.style

        with matplotlib.style.context(["default", _STYLE]):
            return function(*args, **kwargs)

    return run


def new_figure(height: float) -> Figure:
    """Return an empty figure as wide as a page; ``height`` is in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def percent_axis(axis: Any) -> None:
    """Write an axis of shares as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def logarithmic(axes: Any, places: Sequence[float]) -> None:
    """Make the x axis logarithmic, with a tick at each of the places, written as plain numbers."""
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xticks([], minor=True)


def hue_of(index: int) -> str:
    """Return the colour of the so-many-th thing."""
    return HUES[index % len(HUES)]


def shorten(text: str, limit: int = 34) -> str:
    """Return a text of at most ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def colour_key(figure: Figure, entries: Mapping[str, str]) -> None:
    """A legend of colours under the figure."""
    from matplotlib.patches import Patch

    handles = [Patch(color=hue, label=label) for label, hue in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


@styled
def to_svg(figure: Figure, prefix: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element that takes its text and hues from the page around it.

    Args:
        figure: The figure.
        prefix: Put before every id, so that several figures can share a page.
        description: Text for screen readers.
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
    text = text.replace(INK, "currentColor").replace(FAINT, f"var(--line, {FAINT})")
    for i, hue in enumerate(HUES):
        text = text.replace(hue, f"var(--hue-{i + 1}, {hue})")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page sets the size; viewBox keeps the proportions
    return f'<svg role="img" aria-label="{escape(description)}"{head.removeprefix("<svg")}>{rest}'


@styled
def to_png(figure: Figure, dpi: int = 144) -> str:
    """Return a figure on white as a ``data:image/png;base64,...`` address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@styled
def save_png(figure: Figure, path: str | Path, dpi: int = 144) -> Path:
    """Write a figure on white, atomically, and return its path."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor="white")
    return Path(path)
