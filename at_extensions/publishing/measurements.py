"""Figures of the measurements that lie in a run directory: induced distributions and gradient instability."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from at_extensions.analysis import GradientInstability
from at_extensions.publishing.figures import to_svg
from at_extensions.publishing.induced_plots import induced_errors
from at_extensions.publishing.instability_plots import instability_curves

FOLDERS = ("induced_distribution", "instability")
"""Folders of a run directory whose results its report shows, each with a JSON file of the same name."""


class Measurement(NamedTuple):
    """One figure of a measurement, with a caption."""

    caption: str
    svg: str


def measurements(path: Path, label: str, number: int) -> list[Measurement]:
    """Return the figures of the measurements in a run directory, in the order of ``FOLDERS``.

    Args:
        path: The run directory.
        label: The run's name on the page.
        number: Its place on the page, which makes the figures' ids.

    Raises:
        ValueError: A result that cannot be read.
    """
    drawn = []
    for name in FOLDERS:
        file = path / name / f"{name}.json"
        if file.is_file():
            try:
                figure, caption = _DRAWN[name](json.loads(file.read_text(encoding="utf-8")))
            except (UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{file} cannot be shown: {error!r}; measure it anew, or move it away") from error
            drawn.append(Measurement(f"{label}: {caption}", to_svg(figure, f"{name}-{number}", f"{caption} ({label})")))
    return drawn


def _induced(found: Mapping[str, Any]) -> tuple[Any, str]:
    return induced_errors(found["rows"]), (
        "test error of networks that were trained on adversarial examples of kept epochs, made of images that the run "
        "trained on (A) and of held-out ones (B), and local dispersion on each set"
    )


def _instability(found: Mapping[str, Any]) -> tuple[Any, str]:
    models = {name: GradientInstability.from_dict(result) for name, result in found["models"].items()}
    return instability_curves(models), (
        "change of the training gradient along a step, with the attack recomputed and frozen; the gap between both is "
        "the attack’s share"
    )


_DRAWN = {"induced_distribution": _induced, "instability": _instability}
