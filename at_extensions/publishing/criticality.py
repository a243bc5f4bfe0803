"""Layer criticality of several models as JSON, CSV and pictures."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

from at_extensions.analysis import LayerCriticality
from at_extensions.publishing import criticality_plots as plots
from at_extensions.publishing.figures import save_png
from at_extensions.runs import write_json, write_text

_COLUMNS = ("model", "layer", "stage", "criticality", "std", "low", "high", "trials", "accuracy_after", "settled")


def write_criticality(results: Mapping[str, LayerCriticality], out: str | Path) -> list[Path]:
    """Write results and their pictures into a folder and return the paths.

    ``criticality.json`` (``read_criticality`` reads it), ``criticality.csv`` with a row a layer,
    ``criticality_depth.png``, ``criticality_heatmap.png``, ``criticality_stages.png``, and for each model but the first
    its difference to the first, ``criticality_<model>_minus_<first>.png``, where they share layers.

    Raises:
        ValueError: No results, or different divergences.
    """
    out = Path(out)
    figures = {
        "depth": plots.depth_curves(results),
        "heatmap": plots.heat_map(results),
        "stages": plots.stage_bars(results),
    } | _differences(results)
    written = [
        write_json(out / "criticality.json", {name: result.to_dict() for name, result in results.items()}),
        write_text(out / "criticality.csv", _table(results)),
    ]
    return written + [save_png(f, out / f"criticality_{name}.png") for name, f in figures.items()]


def read_criticality(path: str | Path) -> dict[str, LayerCriticality]:
    """Read the results that ``write_criticality`` wrote.

    Args:
        path: The folder, or its ``criticality.json``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not one of ours.
    """
    path = Path(path)
    path = path / "criticality.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no results of layer criticality at {path}")
    try:
        return {name: LayerCriticality.from_dict(data) for name, data in json.loads(path.read_text("utf-8")).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold results of layer criticality: {error!r}") from error


def _differences(results: Mapping[str, LayerCriticality]) -> dict:
    (base, first), *others = results.items()
    figures = {}
    for name, result in others:
        if set(first.short_names.values()) & set(result.short_names.values()):
            key = f"{_slug(name)}_minus_{_slug(base)}"
            figures[key] = plots.difference_bars(first, result, (base, name))
    return figures


def _table(results: Mapping[str, LayerCriticality]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for model, result in results.items():
        writer.writerows({"model": model, **row} for row in result.to_dict()["layers"])
    return buffer.getvalue()


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)
