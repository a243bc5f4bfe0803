"""Source code that rebuilds a published network from timm and RobustBench alone, without this package."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from at_extensions import models
from at_extensions.publishing.pages import render
from at_extensions.publishing.zoo import is_ranked

_COMMON = ("name", "num_classes", "mean", "std", "in_chans")


class _Parts(NamedTuple):
    """What a module needs to build a network: lines of import, templates of helpers, statements."""

    imports: list[str]
    helpers: list[str]
    statements: list[str]


class Sources(NamedTuple):
    """Two Python modules with the same network in them.

    Attributes:
        architecture: Its ``build()`` makes the network; fit for RobustBench's ``model_zoo/architectures``.
        zoo_entry: Besides, it tells timm of the model when it is imported, so that RobustBench finds it. The weights
            lie beside it.
    """

    architecture: str
    zoo_entry: str


def sources(
    recipe: Mapping[str, Any],
    model_id: str,
    dataset: str,
    threat_model: str,
    entry_name: str,
    image_config: Mapping[str, Any] | None = None,
) -> Sources:
    """Write the modules that make the network of ``recipe``, normalisation included.

    They import torch and either timm or RobustBench, and the state dict has the names that ours has.

    Args:
        recipe: Arguments of ``create_model``.
        model_id: RobustBench's name; the weights are called ``<model_id>.safetensors``.
        dataset: What RobustBench is asked for.
        threat_model: The same.
        entry_name: What RobustBench asks timm for.
        image_config: In timm's words, how RobustBench must read images that have no size of their own.

    Raises:
        ValueError: The sources would build something else than ``create_model`` does.
    """
    with torch.random.fork_rng(devices=[]):
        model = models.from_recipe(dict(recipe))
        values = {"model_id": model_id, "dataset": dataset, "threat_model": threat_model, "entry_name": entry_name}
        values |= {"ranked": is_ranked(dataset, threat_model), "recipe": recipe, "parts": _parts(model.network, recipe)}
        values["image_config"] = image_config
        found = Sources(render("architecture.py.jinja", **values), render("zoo_entry.py.jinja", **values))
        _check(found.architecture, model)
    return found


def _parts(network: nn.Module, recipe: Mapping[str, Any]) -> _Parts:
    options = {key: value for key, value in recipe.items() if key not in _COMMON}
    classes, channels, kind = recipe["num_classes"], recipe["in_chans"], type(network).__name__
    home = f"from {type(network).__module__} import {kind}"
    if isinstance(network, models.SmallCNN):
        call = _call(kind, num_classes=classes, in_chans=channels, **options)
        return _Parts([], ["small_cnn.py.jinja"], [f"network = {call}"])
    if kind in ("ResNet", "PreActResNet") and type(network).__module__.startswith("robustbench."):
        return _residual(network, home, classes, channels, options)
    wide = re.fullmatch(r"(?:dm_)?wide_resnet_(\d+)_(\d+)", recipe["name"])
    if wide and kind == "WideResNet":
        call = _call(kind, depth=int(wide[1]), widen_factor=int(wide[2]), num_classes=classes, **options)
        return _Parts([home], [], [f"network = {call}"])
    if wide and kind == "DMWideResNet":
        size = {"num_classes": classes, "depth": int(wide[1]), "width": int(wide[2]), "num_input_channels": channels}
        plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        call = _call(kind, **size, **(plain | options)).removesuffix(")")
        return _Parts([f"{home}, Swish"], [], [f"network = {call}, activation_fn=Swish)"])
    call = _call("timm.create_model", recipe["name"], num_classes=classes, in_chans=channels, **options)
    return _Parts(["import timm"], [], [f"network = {call}"])


def _residual(network: nn.Module, home: str, classes: int, channels: int, options: dict[str, Any]) -> _Parts:
    """RobustBench's ResNets; the constructors know one width and three channels, others are put in afterwards."""
    layers = [network.layer1, network.layer2, network.layer3, network.layer4]
    block, blocks = type(network.layer1[0]).__name__, [len(layer) for layer in layers]
    width = options.pop("width", 64)
    if getattr(network, "bn_before_fc", False):
        options["bn_before_fc"] = True
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    statements = [f"network = {type(network).__name__}({block}, {blocks}, num_classes={classes}{arguments})"]
    if (width, channels) == (64, 3):
        return _Parts([f"{home}, {block}"], [], statements)
    statements.append(f"resize(network, {block}, {blocks}, {width}, {channels}, {classes})")
    return _Parts([f"{home}, {block}"], ["resize.py.jinja"], statements)


def _call(function: str, *arguments: Any, **options: Any) -> str:
    listed = [repr(a) for a in arguments] + [f"{key}={value!r}" for key, value in options.items()]
    return f"{function}({', '.join(listed)})"


def _check(source: str, model: nn.Module) -> None:
    """Build what the source builds and compare it with the model, layer by layer and name by name."""
    namespace: dict[str, Any] = {"__name__": "architecture"}
    exec(compile(source, "architecture.py", "exec"), namespace)  # our own text, made of literals
    built = namespace["build"]()
    layers = [re.sub(r"0x[0-9a-f]+", "", repr(m.network)) for m in (model, built)]
    shapes = [{key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (model, built)]
    if layers[0] != layers[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"{json.dumps(model.recipe)} cannot be rebuilt without this package; publish a network of timm, of "
            "RobustBench or small_cnn"
        )
