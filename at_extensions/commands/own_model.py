"""A run directory made of a user's own checkpoint: checked on two images, then written as a training run is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from at_extensions import factories
from at_extensions.checks import check_logits
from at_extensions.data.split import LabelledSplit
from at_extensions.evaluation import state_digest
from at_extensions.models import check_known, create_model, from_recipe
from at_extensions.processes import sharing
from at_extensions.runs import OWN_CHECKPOINT, RunDirectory, read_recipe, save_weights, versions
from at_extensions.weights import Loaded, load_weights

_OURS = {"checkpoints", factories.SOURCES}


def adopt(
    run: RunDirectory,
    test: LabelledSplit,
    data: Mapping[str, Any],
    *,
    model: str | None,
    weights: str | Path | None,
    weights_key: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    progress: bool = True,
) -> None:
    """Make a run directory of a checkpoint, or check that it is one of the same checkpoint and data.

    Under torchrun the first process writes, and all return when it has.

    Args:
        run: The directory, new or empty, or made by the same call before.
        test: The images that it will be evaluated on.
        data: Their name and options, as ``config.yaml`` will hold them.
        model: A name of ``list_models()``, or ``package.module:factory``; None where the weights name their recipe.
        weights: The file, as ``load_weights`` takes it; None for timm's pretrained ones, or those that a factory loads.
        weights_key: Which of several sets of weights to take.
        model_options: Keyword arguments of the architecture or factory.
        mean: Subtracted from images in [0, 1], one number a channel.
        std: Divided by.
        progress: Print a line about the model to standard error.

    Raises:
        FileExistsError: The directory holds something else.
        FileNotFoundError: No such file of weights.
        TypeError, ValueError: A model that cannot be made, weights of another one, or logits that do not fit the data.
    """
    with sharing(True) as team, team.in_step():
        if team.rank == 0:
            options = dict(model_options or {})
            net, record, found = _load(test, model, weights, weights_key, options, mean, std)
            check_on(net, test)
            checkpoint = {"file": None if weights is None else Path(weights).name, "weights": state_digest(net)}
            if found is not None:
                checkpoint |= {"container": found.container, "prefix": found.prefix}
            if progress:
                print(_summary(record, checkpoint), file=sys.stderr)
            _write(run, net, {"model": record, "checkpoint": checkpoint, "data": dict(data)})


def _load(
    test: LabelledSplit,
    model: str | None,
    weights: str | Path | None,
    key: str | None,
    options: dict[str, Any],
    mean: list[float] | None,
    std: list[float] | None,
) -> tuple[nn.Module, dict[str, Any], Loaded | None]:
    """Return the model in eval mode, the record that names it, and the place in the file of its weights."""
    channels, given = test.image_shape[0], {"mean": mean, "std": std}
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"no checkpoint {weights}")
    if model is None:
        recipe = read_recipe(weights) if Path(weights).suffix == ".safetensors" else None
        if recipe is None:
            raise ValueError(
                f"{weights} does not name its network; give --model NAME or --model package.module:factory"
            )
        net = from_recipe(recipe | options | {name: value for name, value in given.items() if value is not None})
        record = net.recipe
    elif factories.is_factory(model):
        net, record = factories.build(model, test.num_classes, in_chans=channels, options=options, **given)
    else:
        check_known(model)
        if weights is None:
            options["pretrained"] = _pretrained(model, test)
        net = create_model(model, options.pop("num_classes", test.num_classes), in_chans=channels, **given, **options)
        record = net.recipe
    found = None if weights is None else load_weights(net, weights, key=key)
    for name, value in given.items():
        loaded = getattr(net, name).flatten().tolist()
        if value is not None and not torch.allclose(torch.tensor(loaded), torch.tensor(value)):
            raise ValueError(f"{weights} was saved with {name} {loaded}, not {value}; leave --{name} out")
        if not torch.allclose(torch.tensor(loaded), torch.tensor(record[name])):
            record[name] = loaded
    return net.float().eval(), record, found


def _pretrained(name: str, test: LabelledSplit) -> bool:
    """Return True if timm has weights of an architecture for the classes of the data, which need no new head."""
    import timm

    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None or not config.has_weights:
        raise ValueError(f"{name} has no pretrained weights; give your own: --weights FILE")
    if config.num_classes != test.num_classes:
        raise ValueError(
            f"timm's weights of {name} are for {config.num_classes} classes, {test.name} has {test.num_classes}; give "
            "your own: --weights FILE"
        )
    return True


def check_on(model: nn.Module, test: LabelledSplit) -> None:
    """Run a model on two test images before anything long.

    Raises:
        TypeError, ValueError: It fails on images of this shape, or does not return finite logits (B, K) of the classes.
    """
    images, _ = test.tensors(min(2, len(test)))
    try:
        with torch.no_grad():
            logits = model(images)
    except Exception as error:  # a user's module may fail in any way
        raise ValueError(
            f"the model fails on images of {test.name}, shape {tuple(images.shape)} ({type(error).__name__}: {error}); "
            "is it made for this size?"
        ) from error
    check_logits(logits, len(images))
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"the model returns logits that are not finite on images of {test.name}; are its weights whole?"
        )
    if logits.shape[1] != test.num_classes:
        raise ValueError(
            f"the model has {logits.shape[1]} outputs, {test.name} {test.num_classes} classes; of a subset of its "
            f"classes say so: --num-classes {logits.shape[1]} for npz:PATH, all class names in PATH/classes.txt for "
            "folder:PATH"
        )


def _write(run: RunDirectory, net: nn.Module, config: dict[str, Any]) -> None:
    """Write source files, weights and configuration, in this order; a directory of the same checkpoint stays."""
    before = run.config()
    if before:
        differing = [part for part in ("checkpoint", "data") if before.get(part) != config[part]]
        kept = {key: value for key, value in (before.get("model") or {}).items() if key not in ("files", "not_copied")}
        if kept != {key: value for key, value in config["model"].items() if key not in ("root", "local", "not_copied")}:
            differing.append("model")
        if differing:
            raise FileExistsError(
                f"{run.path} holds another model or evaluation ({', '.join(sorted(differing))} differ); choose another "
                "directory, or leave --model and --weights out to evaluate the model that is there"
            )
        return
    if run.path.exists() and (not run.path.is_dir() or {p.name for p in run.path.iterdir()} - _OURS):
        raise FileExistsError(f"{run.path} is not an empty directory; choose another")
    record = config["model"]
    if "factory" in record:
        record = factories.copy_sources(record, run.path, net)
    save_weights(net, run.weights("last"))
    run.write_config(
        {
            "model": record,
            "checkpoint": config["checkpoint"],
            "data": config["data"],
            "method": {"name": OWN_CHECKPOINT},
        }
        | {"versions": versions()}
    )


def _summary(record: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> str:
    """Describe in a line the network, its weights and its normalisation: a wrong one of these spoils the numbers."""
    place = [text for text in (checkpoint.get("container"), checkpoint.get("prefix")) if text]
    weights = (checkpoint["file"] or "its own weights") + (f" ({', '.join(place)})" if place else "")
    plain = set(record["mean"]) <= {0.0} and set(record["std"]) <= {1.0}
    normalised = "none, images in [0, 1] as they are (--mean, --std)" if plain else f"{record['mean']}, {record['std']}"
    return f"model: {record.get('factory') or record['name']}; weights: {weights}; normalisation: {normalised}"
