"""The form in which a model is trained (average, wrapper, modes), and checks of what a trainer is given."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from at_extensions import processes
from at_extensions.checks import device_of
from at_extensions.methods import Method
from at_extensions.training.observers import Observer


def in_eval_mode(model: nn.Module) -> list[nn.Module]:
    """Return the modules in eval mode of a model that is in train mode as a whole; else none."""
    return [module for module in model.modules() if not module.training] if model.training else []


def warn_of_slow_bf16(device: torch.device) -> None:
    """Warn where bfloat16 is emulated."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if device.type == "cpu" and supported is not None and not supported():
        warnings.warn(
            "this CPU has no bfloat16 instructions: precision='bf16' is several times slower here than 'fp32'",
            stacklevel=3,
        )


def average(model: nn.Module, decay: float):
    """Return an exponential moving average of a model's weights."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay)


def wrapped(method: Method) -> nn.Module:
    """Return a method in ``DistributedDataParallel`` where several processes train it, else as it is."""
    if processes.world_size() == 1:
        return method
    device = device_of(method)
    return DistributedDataParallel(method, device_ids=[device] if device.type == "cuda" else None)


def check_observers(observers: Sequence[Observer]) -> list[Observer]:
    """Return the observers as a list, or refuse one that is none."""
    for observer in observers:
        if not isinstance(observer, Observer):
            raise TypeError(f"observers must be training.observers.Observer, got {type(observer).__name__}")
    return list(observers)
