"""Names that a leaderboard shows, made from a run's configuration: architecture, data set, venue, licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
"""RobustBench's data sets, and how many test images its leaderboards ask for."""
UNPUBLISHED = "N/A"
"""RobustBench's venue of a result that no paper or preprint reports."""

_PRINTED = {"preact_resnet": "PreActResNet-", "cifar_resnet": "ResNet-", "resnet": "ResNet-"}
_COMMON = ("name", "num_classes", "mean", "std", "in_chans")
_WIDTH = 64  # of a ResNet that is not narrowed
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_ARXIV = re.compile(r"https?://(?:www\.)?arxiv\.org/(?:abs|pdf)/(\d\d)(\d\d)\.\d{4,5}")


def architecture_name(record: Mapping[str, Any]) -> str:
    """Return the printed name of a network with every option that changes it: ``"ResNet-18 (width 8)"``.

    Args:
        record: A recipe of ``create_model``, or a factory's record of ``config.yaml``.
    """
    if "factory" in record:
        name, options = record["name"], dict(record.get("options") or {})
        options.pop("num_classes", None)
    else:
        name = printed_name(record["name"])
        options = {key: value for key, value in record.items() if key not in _COMMON}
        if name.startswith(("ResNet-", "PreActResNet-")) and options.get("width") == _WIDTH:
            del options["width"]
    listed = ", ".join(f"{key} {_short(value)}" for key, value in options.items() if value is not None)
    return f"{name} ({listed})" if listed else name


def printed_name(name: str) -> str:
    """Return the usual spelling of an architecture's name: ``wide_resnet_28_10`` -> ``WideResNet-28-10``."""
    family = name.rstrip("0123456789_")
    if family.endswith("wide_resnet"):
        return "WideResNet" + name.removeprefix(family).replace("_", "-")
    number = name.removeprefix(family)
    return _PRINTED[family] + number if family in _PRINTED and number.isdecimal() else name


def dataset_name(data: str) -> str:
    """Return the name of a data set in a leaderboard: its own, or that of its file.

    Raises:
        ValueError: A file is called like a data set of RobustBench, which does not make it that data set.
    """
    name = dataset_or_robustbenchs(data)
    if name in TEST_IMAGES and name != data:
        raise ValueError(
            f"the run's data are a file called {name}; if these are the test images of {name.upper()}, say so: "
            f"dataset={name!r} (--dataset {name}). The name of a data set of your own is free"
        )
    return name


def dataset_or_robustbenchs(data: str) -> str:
    """Return the name that a data set has by its own name or its file's, be it that of a data set of RobustBench."""
    kind, colon, path = data.partition(":")
    if not colon and not data.endswith(".npz"):
        return data
    path = (path or kind).replace("\\", "/")
    name = re.sub(r"\W+", "_", PurePath(path).stem, flags=re.ASCII).strip("_") or "own"
    if kind in ("cifar10c", "cifar100c"):
        name = f"{kind}_{name}"
    return name.lower() if name.lower() in TEST_IMAGES else name


def without_folder(data: str) -> str:
    """Return the name of data without the folder of a file: ``npz:/home/me/scans.npz`` -> ``npz:scans.npz``."""
    kind, colon, path = data.partition(":")
    if not colon:
        kind, path = "", data
    return kind + colon + path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def data_name(data: Mapping[str, Any]) -> str:
    """Return the name of a run's test data in its report: that of ``config.yaml``, with the severity if any."""
    name, severity = data.get("name"), data.get("severity")
    return name if severity is None else f"{name}, severity {severity}"


def venue(given: str, link: str) -> str:
    """Return the venue of a paper as RobustBench writes it.

    Args:
        given: Where it appeared; empty if nowhere.
        link: Its address; an arXiv identifier says year and month, ``"arXiv, Feb 2023"``.
    """
    if given.strip():
        return given
    found = _ARXIV.match(link.strip())
    if found is None or not 1 <= int(found[2]) <= 12:
        return UNPUBLISHED
    return f"arXiv, {_MONTHS[int(found[2]) - 1]} 20{found[1]}"


def images_in_words(channels: int) -> str:
    """Return the kind of images that a network takes, by their channels."""
    return {1: "gray", 3: "RGB"}.get(channels, f"of {channels} channels")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
