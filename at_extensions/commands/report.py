"""One page on several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from at_extensions.publishing import write_report
from at_extensions.runs import find_runs
from at_extensions.settings import ReportSettings


def report_runs(folder: str | Path, settings: ReportSettings | None = None, **options: Any) -> Path:
    """Write one HTML page on every run in a folder, with the plots of a sweep where they are one.

    Args:
        folder: A folder of run directories, or one run directory.
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``ReportSettings``).

    Returns:
        The page.

    Raises:
        FileNotFoundError: No such folder, or no run in it.
    """
    settings = ReportSettings.of(settings, options)
    return write_report(find_runs(folder), settings.out or Path(folder) / "report.html", title=settings.title)
