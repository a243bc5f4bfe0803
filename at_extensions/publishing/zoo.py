"""RobustBench's plug-in hook: a published folder that ``robustbench.utils.load_model`` loads by its id."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from at_extensions.models import from_recipe, load_model
from at_extensions.publishing.model_info import check_model_info
from at_extensions.publishing.naming import TEST_IMAGES
from at_extensions.runs import RunDirectory, read_recipe

THREAT_MODELS = ("Linf", "L2")
"""RobustBench's threat models that AutoAttack measures."""

_ID = re.compile(r"[A-Z][A-Za-z]*(?:-[A-Za-z]+)*\d{4}[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*")
_PLAIN = re.compile(r"[A-Za-z0-9_]+")
_folders: dict[str, Path] = {}  # of registered models, by their names in timm


@dataclass(frozen=True)
class Published:
    """A folder that ``publish`` wrote, and how RobustBench is asked for its model.

    Attributes:
        folder: The folder.
        model_id: RobustBench's name of the model.
        dataset: Data set of its leaderboard.
        threat_model: Threat model of its leaderboard.
        info: Contents of its ``model_info`` JSON.
    """

    folder: Path
    model_id: str
    dataset: str
    threat_model: str
    info: Mapping[str, Any]

    @property
    def entry_name(self) -> str:
        """The name under which RobustBench looks in timm."""
        return entry_name(self.model_id, self.dataset, self.threat_model)

    @property
    def weights(self) -> Path:
        """The weights that ``register`` loads."""
        return self.folder / f"{self.model_id}.safetensors"

    @property
    def ranked(self) -> bool:
        """Whether RobustBench has a leaderboard of this data set and threat model."""
        return is_ranked(self.dataset, self.threat_model)


def is_ranked(dataset: str, threat_model: str) -> bool:
    """Whether RobustBench has a leaderboard of a data set and threat model that AutoAttack decides."""
    return dataset in TEST_IMAGES and threat_model in THREAT_MODELS


def check_id(model_id: str) -> str:
    """Return ``model_id`` if RobustBench and timm would take it, and it is a safe file name.

    Raises:
        ValueError: It is not first author, year, first word of the title and an optional variant.
    """
    if not isinstance(model_id, str) or len(model_id) > 100 or not _ID.fullmatch(model_id):
        hint = "; timm cuts a name at its first dot" if "." in str(model_id) else ""
        raise ValueError(
            "a model id is the first author, the year, the first word of the title and an optional variant, of "
            f"letters, digits, '_' and '-', such as Wang2023Better_WRN-28-10; got {model_id!r}{hint}"
        )
    return model_id


def check_dataset(dataset: str) -> str:
    """Return ``dataset`` if it can be part of a name in timm and of a path.

    Raises:
        ValueError: It holds anything but letters, digits and '_'.
    """
    if not isinstance(dataset, str) or not _PLAIN.fullmatch(dataset):
        raise ValueError(f"dataset must be a plain name such as cifar10, got {dataset!r}")
    return dataset


def entry_name(model_id: str, dataset: str, threat_model: str) -> str:
    """Return the name that RobustBench's ``load_model`` asks timm for.

    Raises:
        ValueError: A name that RobustBench or timm would not take.
    """
    name = f"{check_id(model_id).lower().replace('-', '_')}_{check_dataset(dataset).lower()}"
    return f"{name}_{check_dataset(threat_model).lower()}"


def open_published(folder: str | Path) -> Published:
    """Read the folder that ``publish`` wrote.

    Raises:
        FileNotFoundError: It holds no ``model_info/<dataset>/<threat model>/<id>.json``, or no weights.
        ValueError: The result is not RobustBench's, or says another data set than its place.
    """
    folder = Path(folder)
    found = sorted(folder.glob("model_info/*/*/*.json"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder} is no published model: it holds {len(found)} files model_info/DATASET/THREAT_MODEL/ID.json, "
            "not one"
        )
    path = found[0]
    dataset, threat_model = path.parts[-3:-1]
    entry_name(path.stem, dataset, threat_model)
    try:
        info = check_model_info(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # of JSON, of UTF-8 or of the schema
        raise ValueError(f"{path}: {error}") from error
    if info["dataset"] != dataset:
        raise ValueError(f"{path} says dataset {info['dataset']!r} but lies under {dataset!r}")
    published = Published(folder, path.stem, dataset, threat_model, info)
    if not published.weights.is_file():
        raise FileNotFoundError(f"{folder} holds no {published.weights.name}")
    return published


def image_config(size: int) -> dict[str, Any]:
    """Return in timm's words how ``folder:PATH`` brings images to a size, as RobustBench must for ImageNet."""
    return {"input_size": (3, size, size), "crop_pct": 0.875, "interpolation": "bilinear"}


def runs_code(folder: str | Path) -> bool:
    """Whether the network of a published folder is made by a user's code, not by this package's recipes."""
    return "factory" in (RunDirectory(folder).config().get("model") or {})


def _image_size(folder: Path) -> int:
    return (RunDirectory(folder).config().get("data") or {}).get("image_size") or 224


def register(folder: str | Path) -> Published:
    """Make a published model loadable by RobustBench, for the rest of this process.

    Afterwards ``robustbench.utils.load_model(id, dataset=..., threat_model=...)``, which asks timm first, finds it;
    registering a folder again, or a newer one of the same id, is fine. Weights are read when the model is loaded.

    Args:
        folder: A folder that ``publish`` wrote.

    Returns:
        The published model, with the ``model_id``, ``dataset`` and ``threat_model`` that ``load_model`` takes.

    Raises:
        FileNotFoundError: Not a published folder.
        ValueError: A result or a name that RobustBench would not take, a name that timm has already, or a network that
            is code of the folder, which is not run.
    """
    import timm

    published = open_published(folder)
    if runs_code(folder):
        raise ValueError(
            f"the network of {folder} is code in it: read it, then import its zoo_entry.py, which registers it"
        )
    name = published.entry_name
    if timm.is_model(name) and name not in _folders:
        raise ValueError(f"timm has a model called {name} already; publish under another id")
    known = name in _folders
    _folders[name] = published.folder.resolve()
    if not known:
        timm.models.register_model(_entry_point(name))
    return published


def _entry_point(name: str):
    """The function that timm calls to build the model called ``name``."""

    def build(pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, num_classes=None, **kwargs):
        published = open_published(_folders[name])
        weights = published.weights
        recipe = dict(read_recipe(weights) or {})
        if num_classes not in (None, recipe.get("num_classes")):
            raise ValueError(f"{name} has {recipe.get('num_classes')} classes, not {num_classes}")
        model = load_model(weights) if pretrained else from_recipe(recipe | kwargs)
        if published.dataset == "imagenet":
            model.default_cfg = image_config(_image_size(published.folder))  # RobustBench reads images by it
        return model

    build.__name__ = build.__qualname__ = name
    return build
