"""One page that ranks the results in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from at_extensions.publishing import leaderboard
from at_extensions.settings import LeaderboardSettings


def rank_results(folder: str | Path, settings: LeaderboardSettings | None = None, **options: Any) -> Path:
    """Write one sortable HTML page that ranks every ``model_info`` JSON under a folder (``publishing.leaderboard``).

    Args:
        folder: Any folder with results.
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``LeaderboardSettings``).

    Returns:
        The page.
    """
    settings = LeaderboardSettings.of(settings, options)
    return leaderboard(folder, settings.out, title=settings.title)
