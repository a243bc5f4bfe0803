"""Source code that rebuilds a published network without this package: from timm, RobustBench or the user's file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from at_extensions import factories, models
from at_extensions.publishing.pages import render
from at_extensions.publishing.zoo import is_ranked

_COMMON = ("name", "num_classes", "mean", "std", "in_chans")


class _Parts(NamedTuple):
    """Parts of a module that builds a network: lines of import, templates of helpers, statements."""

    imports: list[str]
    helpers: list[str]
    statements: list[str]


class Sources(NamedTuple):
    """Two Python modules with the same network in them.

    Attributes:
        architecture: Its ``build()`` makes the network; fit for RobustBench's ``model_zoo/architectures``.
        zoo_entry: The same, and it registers the model in timm when it is imported, so that RobustBench finds it. The
            weights lie beside it.
        included: Whether RobustBench or timm has the network as it is, but for its normalisation.
        network_module: Name of the module in ``network``.
        network: The user's own source file, which both modules import; None where there is none.
    """

    architecture: str
    zoo_entry: str
    included: bool
    network_module: str
    network: str | None


def sources(
    recipe: Mapping[str, Any],
    model_id: str,
    dataset: str,
    threat_model: str,
    entry_name: str,
    image_config: Mapping[str, Any] | None = None,
    *,
    model: nn.Module | None = None,
    run: Path | None = None,
) -> Sources:
    """Write the modules that make the network of ``recipe``, normalisation included.

    They import torch and timm, RobustBench or the user's own file, and the state dict has the same names as the run's.

    Args:
        recipe: Arguments of ``create_model``, or the record of a factory.
        model_id: RobustBench's name; the weights are called ``<model_id>.safetensors``.
        dataset: The data set of its leaderboard.
        threat_model: The threat model of its leaderboard.
        entry_name: Its name in timm.
        image_config: In timm's words, how RobustBench must read images that have no size of their own.
        model: The network of a factory.
        run: Its run directory.

    Raises:
        ValueError: The sources would build another network than the run's, or a factory's code cannot be shipped.
    """
    own = "factory" in recipe
    module = f"{model_id.lower().replace('-', '_')}_network"
    network = _shipped(recipe, run) if own else None
    with torch.random.fork_rng(devices=[]):
        model = model if own else models.from_recipe(dict(recipe))
        home, attribute = recipe["factory"].split(":") if own else ("", "")
        homes = [f"robustbench.model_zoo.architectures.{module}", module] if network is not None else [home, home]
        parts = [
            _of_factory(place, attribute, recipe["options"]) if own else _parts(model.network, recipe)
            for place in homes
        ]
        values = {"model_id": model_id, "dataset": dataset, "threat_model": threat_model, "entry_name": entry_name}
        values |= {"ranked": is_ranked(dataset, threat_model), "recipe": recipe, "image_config": image_config}
        architecture = render("architecture.py.jinja", **values, parts=parts[0])
        found = Sources(
            architecture,
            render("zoo_entry.py.jinja", **values, parts=parts[1]),
            included=not own and not parts[0].helpers,
            network_module=module,
            network=network,
        )
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, f"{module}.py").write_text(network or "", encoding="utf-8")
            with factories.importing_from(Path(folder), {module}):
                _check(render("architecture.py.jinja", **values, parts=parts[1]), model, model_id)
    return found


def _shipped(record: Mapping[str, Any], run: Path) -> str | None:
    """Return the source file of a factory; None for one of an installed package.

    Raises:
        ValueError: There is no single file that could be shipped.
    """
    if "package" in record:
        return None
    files = sorted(record.get("files") or ())
    if len(files) != 1:
        reason = (
            f"it is in several files ({', '.join(files)})" if files else record.get("not_copied", "it was not copied")
        )
        raise ValueError(
            f"the code of {record['factory']} cannot be shipped: {reason}; put the network into one file that imports "
            "torch and installed packages alone, and evaluate again"
        )
    return (run / factories.SOURCES / files[0]).read_text(encoding="utf-8")


def _of_factory(home: str, attribute: str, options: Mapping[str, Any]) -> _Parts:
    top = attribute.partition(".")[0]
    return _Parts([f"from {home} import {top}"], [], [f"network = {_call(attribute, **options)}"])


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


def _check(source: str, model: nn.Module, name: str) -> None:
    """Run the source's ``build()`` and compare with the model, layer by layer and name by name."""
    namespace: dict[str, Any] = {"__name__": "architecture"}
    exec(compile(source, "architecture.py", "exec"), namespace)  # our own text, made of literals
    built = namespace["build"]()
    layers = [re.sub(r"0x[0-9a-f]+", "", repr(m.network)) for m in (model, built)]
    shapes = [{key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (model, built)]
    if layers[0] != layers[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"the network of {name} cannot be rebuilt without this package; publish a network of timm, of RobustBench, "
            "of a file of your own, or small_cnn"
        )
