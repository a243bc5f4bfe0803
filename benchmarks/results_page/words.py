"""Numbers, machines and tables as RESULTS.md writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from at_extensions.experiments import PairedDifference


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def points(difference: PairedDifference) -> str:
    """Return a difference of accuracies in percentage points, with its interval."""
    text = f"{100 * difference.mean:+.1f}"
    if difference.interval is None:
        return text
    return text + f" ({100 * difference.interval[0]:+.1f} to {100 * difference.interval[1]:+.1f})"


def verdict(differs: bool | None, mean: float) -> str:
    """Return what an interval says of the claim that a difference is positive."""
    return "not decided at this scale" if not differs else "holds" if mean > 0 else "does not hold"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def goal(found: dict) -> str:
    return f"Goal ({found['goal']}): {'met' if found['goal_met'] else 'not met'}."


def machine(found: dict) -> str:
    """Return a machine in words; older files name it in other ways."""
    device = found.get("device") or found.get("gpu") or found["processor"]
    torch = found["versions"]["torch"] if "versions" in found else found.get("torch")
    threads = f"{found['threads']} thread" + "s" * (found["threads"] > 1)
    return f"{device}, {found['cores']} cores, {threads}" + (f", torch {torch}" if torch else "")


def machines(rows: Iterable[dict]) -> str:
    return "; ".join(dict.fromkeys(machine(row["machine"]) for row in rows))


def origin(command: str, rows: Sequence[dict], *more: str) -> str:
    """Return the line under a heading: command, machine, and more."""
    return f"`{command}`\n\n" + " ".join([f"Machine: {machines(rows)}.", *more]) + "\n"


def load(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def load_all(folder: Path) -> dict[str, dict]:
    """Return the JSON files of a folder by name."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}


def network(recipe: dict) -> str:
    """Return an architecture with its width, where it has one."""
    name, width = recipe.get("model") or recipe["name"], (recipe.get("model_options") or recipe).get("width")
    return f"`{name}`" + (f", width {width}" if width else "")
