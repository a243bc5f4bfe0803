"""The commands that make a run anew: training from its config.yaml, evaluation from its report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from at_extensions.settings import EvaluateSettings, TrainSettings


def train_command(config: Mapping[str, Any], out: str) -> str | None:
    """Return the shell command that trains a run again, or None for a configuration that ``train`` did not write.

    Args:
        config: Contents of the run's ``config.yaml``.
        out: The run directory to name.
    """
    try:
        return shlex.join(["at-extensions", "train", out, *TrainSettings.from_config(config).arguments()])
    except (TypeError, ValueError):
        return None


def evaluate_command(evaluation: Mapping[str, Any], run: str, data: str | None = None) -> str:
    """Return the shell command that evaluates a run again.

    Args:
        evaluation: Contents of the run's ``evaluation.json``.
        run: The run directory to name.
        data: Name of the data set that the run trained on; another one is then named.
    """
    same = ("norm", "eps", "version", "seed", "precision", "batch_size")
    given = {key: evaluation[key] for key in same if evaluation.get(key) is not None}
    if evaluation.get("version") == "custom":
        given["attacks"] = list(evaluation["after_attack"])
    if evaluation.get("indices") is not None:
        given["n_examples"] = evaluation["n_examples"]
    if data is not None and evaluation.get("data_name") not in (None, data):
        given["data"] = evaluation["data_name"]
    given["compile"] = bool(evaluation.get("compiled"))
    return shlex.join(["at-extensions", "evaluate", run, *EvaluateSettings(**given).arguments()])
