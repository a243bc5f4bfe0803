"""A leaderboard of any folder of ``model_info`` JSONs: one sortable HTML page that needs nothing but itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from at_extensions.checks import parse_fraction
from at_extensions.publishing.pages import render
from at_extensions.runs import write_text

_log = logging.getLogger(__name__)
_NEEDED = ("name", "authors", "link", "venue", "architecture", "dataset", "eps", "clean_acc", "additional_data")
_BOARDS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet", "svhn": "SVHN"}


@dataclass(frozen=True)
class _Entry:
    """One row."""

    model_id: str
    threat_model: str
    info: Mapping[str, Any]

    @property
    def clean(self) -> float:
        return float(self.info["clean_acc"])

    @property
    def robust(self) -> float:
        """Accuracy under AutoAttack, or under corruptions, in per cent."""
        key = "corruptions_acc" if "corruptions_acc" in self.info else "autoattack_acc"
        return float(self.info[key])

    @property
    def best_known(self) -> float:
        """The lowest accuracy that any evaluation found."""
        return min(self.robust, float(self.info.get("external") or self.robust))

    @property
    def link(self) -> str | None:
        """The paper's address, if a browser may be sent there."""
        link = str(self.info["link"])
        return link if link.startswith(("https://", "http://")) else None

    @property
    def board(self) -> tuple[str, str, float]:
        """Data set, threat model and radius, within which results compare."""
        radius = 0.0 if "corruptions_acc" in self.info else parse_fraction(self.info["eps"] or 0)
        return str(self.info["dataset"]), self.threat_model, radius


@dataclass(frozen=True)
class _Board:
    """Rows that can be compared, best first."""

    title: str
    corruptions: bool
    entries: list[_Entry]


def leaderboard(folder: str | Path, out: str | Path | None = None, *, title: str = "Robustness leaderboard") -> Path:
    """Write one self-contained HTML page that ranks every result under a folder.

    There is a table for each data set, threat model and radius, in the order of robust accuracy; a click on a column's
    head sorts by it, and a field filters the rows.

    Args:
        folder: Any folder with ``model_info/<dataset>/<threat model>/<id>.json`` in or under it, RobustBench's own
            checkout too; where nothing is called ``model_info``, every JSON under it is taken.
        out: File to write; ``leaderboard.html`` in the folder if None.
        title: Heading of the page.

    Returns:
        The path written. A JSON that is no result is left out; the page and a warning name it and say why.

    Raises:
        FileNotFoundError: No such folder, or no JSON under it.
        ValueError: None of the JSONs is a result.
    """
    folder = Path(folder)
    paths = _find(folder)
    entries, left_out = [], []
    for path in paths:
        try:
            entries.append(_read(path))
        except ValueError as error:
            left_out.append((path.relative_to(folder).as_posix(), str(error)))
            _log.warning("%s is left out: %s", path, error)
    if not entries:
        name, problem = left_out[0]
        raise ValueError(f"none of the {len(paths)} JSON files under {folder} is a result; {name}: {problem}")
    page = render("leaderboard.html", title=title, boards=_boards(entries), left_out=left_out)
    return write_text(folder / "leaderboard.html" if out is None else out, page)


def _find(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    every = sorted(folder.rglob("*.json"))
    if not every:
        raise FileNotFoundError(f"no JSON files under {folder}; publish a run first, or point at a model_info folder")
    return [path for path in every if "model_info" in path.resolve().parts[:-1]] or every


def _read(path: Path) -> _Entry:
    """Read one result; the values that decide the ranking must be there and be numbers."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"it cannot be read ({error})") from error
    if not isinstance(info, dict):
        raise ValueError("it does not hold an object")
    missing = [key for key in _NEEDED if key not in info]
    if "autoattack_acc" not in info and "corruptions_acc" not in info:
        missing.append("autoattack_acc")
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")
    entry = _Entry(path.stem, path.parent.name, info)
    try:
        accuracies = (entry.clean, entry.robust, entry.best_known)
        inside = all(0 <= accuracy <= 100 for accuracy in accuracies) and entry.board[2] >= 0
    except (TypeError, ValueError) as error:
        raise ValueError(f"an accuracy or eps is no number ({error})") from error
    if not inside:
        raise ValueError("an accuracy lies outside 0 to 100 or eps is negative")
    return entry


def _boards(entries: list[_Entry]) -> list[_Board]:
    found: dict[tuple[str, str, float], list[_Entry]] = {}
    for entry in sorted(entries, key=lambda e: (-e.best_known, -e.clean, e.model_id)):
        found.setdefault(entry.board, []).append(entry)
    return [
        _Board(_title(*board, rows[0].info["eps"]), board[1].startswith("corruptions"), rows)
        for board, rows in sorted(found.items())
    ]


def _title(dataset: str, threat_model: str, radius: float, eps: Any) -> str:
    return f"{_BOARDS.get(dataset, dataset)}, {threat_model}" + (f", ε = {eps}" if radius else "")
