"""The submission of a run, and the commands that lead to it and verify it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from at_extensions.evaluation import RobustnessReport
from at_extensions.publishing import publish
from at_extensions.publishing.submission import shortcomings
from at_extensions.runs import RunDirectory
from at_extensions.settings import Paper, PublishSettings, VerifySettings


def publish_run(run: str | Path, settings: PublishSettings | None = None, **options: Any) -> Path:
    """Write an evaluated run as a folder that is ready to submit to RobustBench (``publishing.publish``).

    Args:
        run: A run with weights and an evaluation.
        settings: The settings.
        **options: Single settings by name (see ``PublishSettings``).

    Returns:
        The folder.
    """
    settings = PublishSettings.of(settings, options)
    return publish(
        run,
        settings.paper,
        settings.id,
        settings.out or settings.id,
        dataset=settings.dataset or _dataset_of(RunDirectory(run)),
        architecture=settings.architecture,
        allow_partial=settings.allow_partial,
        allow_other_eps=settings.allow_other_eps,
    )


def publish_command(run: str | Path) -> str:
    """Return the shell command that publishes an evaluated run, with a paper's details to fill in."""
    directory = RunDirectory(run)
    name = _name_of(directory)
    dataset = _dataset_of(directory) or re.sub(r"\W", "_", Path(name.partition(":")[2]).stem)
    report = RobustnessReport.load(directory.path / "evaluation.json")
    settings = PublishSettings(
        id="Author2026Title",
        paper=Paper("Title", "First Author", "https://example.org"),
        dataset=dataset if dataset != name else None,
        allow_partial=bool(shortcomings(report, dataset)),
    )
    return shlex.join(["at-extensions", "publish", str(run), *settings.arguments()])


def verify_command(folder: str | Path, run: str | Path) -> str:
    """Return the shell command that verifies a run's submission, with the data that its name does not tell."""
    directory = RunDirectory(run)
    data, root = _name_of(directory), (directory.config().get("data") or {}).get("root")
    settings = VerifySettings(data=data if _dataset_of(directory) is None else None, root=root)
    return shlex.join(["at-extensions", "verify", str(folder), *settings.arguments()])


def _name_of(run: RunDirectory) -> str:
    return str((run.config().get("data") or {}).get("name") or "")


def _dataset_of(run: RunDirectory) -> str | None:
    """Return the run's data set where it has a name of its own, or None for a file or folder."""
    name = _name_of(run)
    return name if name and ":" not in name else None
