"""Trained models by name: a run directory, a weights file, a RobustBench id, a timm architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from at_extensions import factories
from at_extensions.checks import check_name, unknown_name
from at_extensions.models import check_known, create_model, list_models, load_model
from at_extensions.runs import RunDirectory
from at_extensions.weights import load_weights


class NamedModel(NamedTuple):
    """A trained model.

    Attributes:
        model: In eval mode, on the CPU.
        fresh: ``seed -> module`` for models that carry no recipe; else None.
    """

    model: nn.Module
    fresh: Callable[[int], nn.Module] | None


def open_model(
    name: str | Path,
    checkpoint: str | Path | None = None,
    *,
    num_classes: int = 10,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    folder: str | Path = "models",
) -> NamedModel:
    """Open a trained model by name.

    Args:
        name: A run directory (one of a user's own network **runs its code**); a weights file that this package wrote; a
            RobustBench id; or an architecture of ``list_models()``, with the weights ``checkpoint`` or timm's
            pretrained ones.
        checkpoint: Weights of an architecture, as ``load_weights`` takes them.
        num_classes: Outputs of an architecture.
        dataset: RobustBench's data set of an id: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
        threat_model: RobustBench's threat model of an id.
        folder: RobustBench's folder of downloads.

    Raises:
        FileNotFoundError: No such run, file or checkpoint.
        ValueError: An unknown name, or weights of another architecture.
    """
    name, path = str(name), Path(name)
    if path.exists() or path.suffix == ".safetensors":
        return open_run(path) if path.is_dir() else NamedModel(load_model(path), None)
    if "/" in name and ":" not in name:
        raise FileNotFoundError(f"no run directory or weights file {name}")
    if checkpoint is None and name != name.lower():  # ids begin with an author, architectures are lower case
        return _from_robustbench(name, num_classes, dataset, threat_model, folder)
    return NamedModel(_architecture(name, checkpoint, num_classes).eval(), None)


def open_run(run: str | Path | RunDirectory, kind: str | None = None) -> NamedModel:
    """Open the model of a run directory.

    A run that evaluates a user's own network (``evaluate --model package.module:factory``) holds a copy of its source,
    which **runs** here; other runs hold data alone.

    Args:
        run: The run directory.
        kind: ``"best"`` or ``"last"``; the weights to publish if None.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: Damaged weights, or a network that cannot be made.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    path = run.published_weights() if kind is None else run.weights(kind)
    record = run.config().get("model") or {}
    if "factory" not in record:
        return NamedModel(load_model(path), None)
    model = factories.rebuild(record, run.path)
    load_weights(model, path)
    return NamedModel(model.eval(), functools.partial(factories.rebuild, record, run.path))


def _from_robustbench(name: str, num_classes: int, dataset: str, threat_model: str, folder: str | Path) -> NamedModel:
    import timm
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts
    from robustbench.utils import load_model as load_by_id

    check_name("RobustBench data set", dataset, [d.value for d in BenchmarkDataset])
    check_name("threat model", threat_model, [t.value for t in ThreatModel])
    zoo = model_dicts[BenchmarkDataset(dataset)].get(ThreatModel(threat_model), {})
    hooked = f"{name.lower().replace('-', '_')}_{dataset.lower()}_{threat_model.lower()}"  # as RobustBench asks timm
    if name in zoo:
        fresh = zoo[name]["model"]
    elif timm.is_model(hooked):
        fresh = functools.partial(timm.create_model, hooked, num_classes=num_classes)
    else:
        raise unknown_name(
            f"model of RobustBench ({dataset}, {threat_model}) or architecture", name, [*zoo, *list_models()]
        )
    model = load_by_id(model_name=name, model_dir=str(folder), dataset=dataset, threat_model=threat_model)
    return NamedModel(model.eval(), lambda seed: fresh())


def _architecture(name: str, checkpoint: str | Path | None, num_classes: int) -> nn.Module:
    import timm

    check_known(name)
    if checkpoint is not None:
        model = create_model(name, num_classes)
        load_weights(model, checkpoint)
        return model
    if ":" not in name and not timm.is_model(name):
        raise ValueError(f"{name} has no pretrained weights; give its checkpoint")
    return create_model(name, num_classes, pretrained=True)
