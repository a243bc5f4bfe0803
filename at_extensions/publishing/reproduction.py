"""The commands that make a run anew: training from its config.yaml, evaluation from its report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

_DERIVED = ("class_counts", "num_classes", "in_chans")  # follow from the data


def train_command(config: Mapping[str, Any], out: str) -> str | None:
    """Return the shell command that trains a run again, or None for a configuration that ``train`` did not write.

    Args:
        config: What the run's ``config.yaml`` holds.
        out: The run directory to name.
    """
    groups = [config.get(part) for part in ("data", "model", "method", "training")]
    if not all(isinstance(group, Mapping) for group in groups) or not all(group.get("name") for group in groups[:3]):
        return None
    data, model, method, training = (dict(group) for group in groups)
    settings = {"data": data.pop("name"), **data, "model": model.pop("name")}
    settings |= {key: model.pop(key) for key in ("mean", "std") if key in model}
    settings["model_options"] = {key: value for key, value in model.items() if key not in _DERIVED}
    settings |= {"method": method.pop("name"), **method, **training, "seed": config.get("seed")}
    return _join(["train", out], {key: value for key, value in settings.items() if key not in _DERIVED})


def evaluate_command(evaluation: Mapping[str, Any], run: str) -> str:
    """Return the shell command that evaluates a run again.

    Args:
        evaluation: What the run's ``evaluation.json`` holds.
        run: The run directory to name.
    """
    settings = {key: evaluation.get(key) for key in ("norm", "eps", "version", "seed")}
    if evaluation.get("version") == "custom":
        settings["attacks"] = list(evaluation["after_attack"])
    if evaluation.get("precision") != "fp32":
        settings["precision"] = evaluation.get("precision")
    return _join(["evaluate", run], settings)


def _join(words: list[str], settings: Mapping[str, Any]) -> str:
    for key, value in settings.items():
        if value is not None and value != {}:
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(["at-extensions", *words])
