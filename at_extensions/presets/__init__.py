"""Recipes of papers, as settings of ``train``: one YAML file each, beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from at_extensions.settings import read_settings

_FOLDER = Path(__file__).parent


def list_presets() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """Return a paper's recipe as settings of ``train``.

    Raises:
        ValueError: Unknown name.

    Example:
        >>> train("runs/deat", **preset("deat") | {"data": "npz:cifar10.npz"})
    """
    from at_extensions.checks import check_name

    return read_settings(_FOLDER / f"{check_name('preset', name, list_presets())}.yaml")
