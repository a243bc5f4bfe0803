"""The RobustBench result of a run that no paper names yet."""

from __future__ import annotations

import re
from pathlib import Path

from at_extensions.publishing.model_info import Paper, model_info, write_model_info
from at_extensions.publishing.naming import architecture_name, dataset_or_robustbenchs
from at_extensions.runs import RunDirectory


def write_run_info(run: str | Path | RunDirectory) -> Path:
    """Write an evaluated run's numbers as ``RUN/model_info/<dataset>/<threat>/<run>.json``.

    Title, authors and link say that the result is unpublished; ``publish`` asks for the real ones.

    Args:
        run: A run directory with an ``evaluation.json``.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: The run has not been evaluated.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    evaluation, config = run.evaluation(), run.config()
    if evaluation is None:
        raise FileNotFoundError(f"{run.path} has no evaluation.json; run: at-extensions evaluate {run.path}")
    method = config["method"]["name"]
    dataset = dataset_or_robustbenchs(config["data"]["name"])
    info = model_info(
        evaluation,
        Paper(title=f"{method} run {run.path.resolve().name}", authors="unpublished", link="unpublished"),
        dataset=dataset,
        architecture=architecture_name(config["model"]),
    )
    name = re.sub(r"[^\w-]", "_", run.path.resolve().name)
    return write_model_info(info, run.path / "model_info", name, evaluation["norm"])
