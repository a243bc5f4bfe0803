"""RobustBench's ``model_info`` JSON: one result, as the leaderboard stores it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from at_extensions.checks import check_eps, check_norm, parse_fraction
from at_extensions.publishing.naming import venue
from at_extensions.settings import Paper

_ACCURACY = re.compile(r"\d{1,3}\.\d{2}")
_REQUIRED: dict[str, type] = {
    "link": str,
    "name": str,
    "authors": str,
    "additional_data": bool,
    "number_forward_passes": int,
    "dataset": str,
    "venue": str,
    "architecture": str,
    "eps": str,
    "clean_acc": str,
    "reported": str,
    "autoattack_acc": str,
}
_OPTIONAL: dict[str, type] = {"footnote": str, "unreliable": bool, "external": str}


def percent(fraction: float, name: str = "accuracy") -> str:
    """Return a fraction as per cent with two decimals: 0.5342 -> ``"53.42"``.

    Raises:
        TypeError: Not a number.
        ValueError: Outside [0, 1].
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"{name} must be a fraction in [0, 1], got {fraction!r}")
    if not 0 <= fraction <= 1:
        hint = f"; did you mean {fraction / 100:g}?" if 1 < fraction <= 100 else ""
        raise ValueError(f"{name} must be a fraction in [0, 1], got {fraction!r}{hint}")
    return f"{100 * fraction:.2f}"


def eps_fraction(eps: float, norm: str = "Linf") -> str:
    """Return a radius as leaderboards write it: ``"8/255"`` for 8/255, ``"0.5"`` for 0.5, ``"0.031"`` for 0.031.

    Args:
        eps: Radius: in (0, 1] for Linf, any positive number for L2 and L1.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Raises:
        TypeError: eps is not a number.
        ValueError: Unknown norm or eps outside its range.
    """
    eps = check_eps(eps, check_norm(norm))
    short = f"{eps:.3f}".rstrip("0").rstrip(".")
    if float(short) == eps:
        return short
    steps = eps * 255
    if round(steps) >= 1 and abs(steps - round(steps)) < 1e-5:  # also when eps went through single precision
        return f"{round(steps)}/255"
    return f"{eps:.10g}"


def model_info(
    report: Any,
    paper: Paper,
    *,
    dataset: str,
    architecture: str,
    number_forward_passes: int = 1,
    footnote: str | None = None,
) -> dict[str, Any]:
    """Return RobustBench's JSON of an evaluation.

    Accuracies become per cent in strings with two decimals, the radius a fraction in a string.

    Args:
        report: A ``RobustnessReport`` or its ``to_dict()``.
        paper: The paper of the result.
        dataset: Name of the data, such as ``"cifar10"``.
        architecture: Printed name of the network, such as ``"PreActResNet-18"``.
        number_forward_passes: Forward passes one prediction takes.
        footnote: Replaces the paper's footnote.

    Raises:
        ValueError: A number is missing or out of range; the message lists everything that is wrong.
    """
    values = report if isinstance(report, Mapping) else report.to_dict()
    lacking = [key for key in ("norm", "eps", "clean_accuracy", "robust_accuracy") if values.get(key) is None]
    if lacking:
        raise ValueError(f"the evaluation lacks {', '.join(lacking)}; run evaluate(...) and pass its report")
    info = {
        "link": paper.link,
        "name": paper.title,
        "authors": paper.authors,
        "additional_data": paper.additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue(paper.venue, paper.link),
        "architecture": architecture,
        "eps": eps_fraction(values["eps"], values["norm"]),
        "clean_acc": percent(values["clean_accuracy"], "clean_accuracy"),
        "reported": "" if paper.reported is None else percent(paper.reported, "reported"),
        "autoattack_acc": percent(values["robust_accuracy"], "robust_accuracy"),
        "footnote": paper.footnote if footnote is None else footnote,
        "unreliable": not values.get("reliable", True),
    }
    return check_model_info(info)


def check_model_info(info: Any) -> dict[str, Any]:
    """Return ``info`` if it is a result that RobustBench's leaderboard can hold.

    Args:
        info: Contents of a ``model_info`` JSON. ``corruptions_acc`` may replace ``autoattack_acc``, and eps is then
            allowed to be null.

    Raises:
        ValueError: Missing keys, values of the wrong type or badly formed; one message lists them all.
    """
    if not isinstance(info, Mapping):
        raise ValueError(f"a model_info JSON holds one object, got {type(info).__name__}")
    required = dict(_REQUIRED)
    corruptions = "corruptions_acc" in info
    if corruptions:
        required["corruptions_acc"] = required.pop("autoattack_acc")
    missing = [key for key in required if key not in info]
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    for key, kind in {**required, **_OPTIONAL}.items():
        if key in info and not (corruptions and key == "eps" and info[key] is None):
            problems += _problems(key, info[key], kind)
    if problems:
        raise ValueError("not a RobustBench model_info: " + "; ".join(problems))
    return dict(info)


def _problems(key: str, value: Any, kind: type) -> list[str]:
    """Return the faults of one value."""
    if type(value) is not kind:  # bool is an int to isinstance
        return [f"{key} must be {kind.__name__}, got {type(value).__name__} {value!r}"]
    if key == "eps":
        try:
            fits = parse_fraction(value) > 0
        except ValueError:
            fits = False
        return [] if fits else [f'eps must be a positive number or fraction such as "8/255", got {value!r}']
    if key.endswith("_acc") or key == "external" or (key == "reported" and value):
        if not _ACCURACY.fullmatch(value) or float(value) > 100:
            return [f'{key} must be per cent with two decimals such as "53.42", got {value!r}']
    elif kind is int and value < 1:
        return [f"{key} must be at least 1, got {value}"]
    elif key in ("name", "authors", "dataset", "architecture") and not value.strip():
        return [f"{key} must not be empty"]
    return []


def write_model_info(info: Mapping[str, Any], root: str | Path, model_id: str, threat_model: str) -> Path:
    """Check ``info`` and write ``root/<dataset>/<threat_model>/<model_id>.json``, where RobustBench looks for it.

    Returns:
        The path written.

    Raises:
        ValueError: ``info`` is not a valid result, or a name would leave ``root``.
    """
    info = check_model_info(info)
    for name, value in (("dataset", info["dataset"]), ("threat_model", threat_model), ("model_id", model_id)):
        if not re.fullmatch(r"[\w-][\w.-]*", value):
            raise ValueError(f"{name} must be a plain name of letters, digits, '_' and '-', got {value!r}")
    path = Path(root) / info["dataset"] / threat_model / f"{model_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
