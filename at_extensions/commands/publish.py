"""The submission of a run, and the commands that lead to it and verify it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from at_extensions.evaluation import RobustnessReport
from at_extensions.publishing import publish
from at_extensions.publishing.naming import TEST_IMAGES, dataset_or_robustbenchs
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
        dataset=settings.dataset,
        architecture=settings.architecture,
        allow_partial=settings.allow_partial,
        allow_other_eps=settings.allow_other_eps,
    )


def publish_command(run: str | Path) -> str:
    """Return the shell command that publishes an evaluated run, with a paper's details to fill in."""
    config, report = RunDirectory(run).config(), RobustnessReport.load(Path(run) / "evaluation.json")
    dataset = dataset_or_robustbenchs(config["data"]["name"])
    settings = PublishSettings(
        id="Author2026Title",
        paper=Paper("Title", "First Author", "https://example.org"),
        dataset=dataset if dataset in TEST_IMAGES and dataset != config["data"]["name"] else None,
        allow_partial=bool(shortcomings(report, dataset)),
    )
    return shlex.join(["at-extensions", "publish", str(run), *settings.arguments()])


def verify_command(folder: str | Path, run: str | Path) -> str:
    """Return the shell command that verifies a run's submission on this machine, with the data of the run."""
    config = RunDirectory(run).config()
    data = config.get("data") or {}
    name = str(data.get("name") or "")
    settings = VerifySettings(
        data=name if ":" in name or name.endswith(".npz") else None,
        root=data.get("root"),
        trust_code="factory" in (config.get("model") or {}),
    )
    return shlex.join(["at-extensions", "verify", str(folder), *settings.arguments()])
