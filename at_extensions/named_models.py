"""Trained models by what users call them: a run directory, a weights file, a RobustBench id, a timm architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from at_extensions.checks import check_name, unknown_name
from at_extensions.models import check_known, create_model, list_models, load_model
from at_extensions.runs import RunDirectory, load_tensors

_INSIDE = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the weights


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
        name: A run directory; a weights file that this package wrote; a RobustBench id; or an architecture of
            ``list_models()``, whose weights are ``checkpoint``, or timm's pretrained ones.
        checkpoint: Weights of an architecture: safetensors, or a PyTorch file that holds tensors alone.
        num_classes: Outputs of an architecture.
        dataset: RobustBench's data set of an id: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
        threat_model: RobustBench's threat model of an id.
        folder: Where RobustBench keeps what it downloads.

    Raises:
        FileNotFoundError: No such run, file or checkpoint.
        ValueError: A name that nothing goes by, or weights of another architecture.
    """
    name, path = str(name), Path(name)
    if path.exists() or path.suffix == ".safetensors":
        return NamedModel(load_model(RunDirectory(path).published_weights() if path.is_dir() else path), None)
    if "/" in name and ":" not in name:
        raise FileNotFoundError(f"no run directory or weights file {name}")
    if checkpoint is None and name != name.lower():  # ids begin with an author, architectures are lower case
        return _from_robustbench(name, num_classes, dataset, threat_model, folder)
    return NamedModel(_architecture(name, checkpoint, num_classes).eval(), None)


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
        load_checkpoint(model, checkpoint)
        return model
    if ":" not in name and not timm.is_model(name):
        raise ValueError(f"{name} has no pretrained weights; give its checkpoint")
    return create_model(name, num_classes, pretrained=True)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load weights into a model of ``create_model``, whether they were saved with its normalisation or without.

    Args:
        model: Changed in place.
        path: Safetensors, or a PyTorch file that holds tensors alone: a state dict, or one under ``"state_dict"``,
            ``"model_state_dict"``, ``"model"`` or ``"net"``; a ``module.`` before each name is dropped.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged, not weights alone, or of another architecture.
    """
    tensors = _read(Path(path))
    targets = (model, getattr(model, "network", model))
    target = max(targets, key=lambda m: len(m.state_dict().keys() & tensors.keys()))
    own = target.state_dict()
    wrong = {
        "missing": [k for k in own if k not in tensors],
        "unknown": [k for k in tensors if k not in own],
        "of another shape": [k for k in own if k in tensors and own[k].shape != tensors[k].shape],
    }
    what = [f"{len(names)} {label} ({names[0]}, ...)" for label, names in wrong.items() if names]
    if what:
        raise ValueError(f"{path} is a checkpoint of another architecture: tensors " + ", ".join(what))
    target.load_state_dict(tensors)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is damaged or holds more than tensors, which is not loaded: {error}") from error
    for key in _INSIDE:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not all(isinstance(t, Tensor) for t in data.values()):
        raise ValueError(f"{path} holds no state dict")
    return {key.removeprefix("module."): tensor for key, tensor in data.items()}
