"""A trace of a model's forward pass: which BatchNorm is nothing but the last part of a convolution."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from at_extensions.checks import device_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in _HOOKS)


class _Tracer(fx.Tracer):
    """Records which module's output goes where; looks inside containers of modules ``of_interest`` alone.

    Attributes:
        read: Ids of the tensors that are read outside the module they belong to.
        lowered: Modules seen to run under autocast.
        full_precision: Modules seen to run where the model has switched it off.
    """

    def __init__(self, device: torch.device, of_interest: tuple[type, ...]):
        super().__init__()
        self.device = device
        self.of_interest = of_interest
        self.read: set[int] = set()
        self.lowered: set[nn.Module] = set()
        self.full_precision: set[nn.Module] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph; where a hook would see what goes in or out, all of it is."""
        if isinstance(m, (_ConvNd, _BatchNorm)) or is_hooked(m):
            return True
        return not any(isinstance(inner, self.of_interest) for inner in m.modules())

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Note whether autocast is on."""
        (self.lowered if torch.is_autocast_enabled(self.device.type) else self.full_precision).add(m)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: dict) -> object:
        """Note that a tensor was read."""
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class Trace(NamedTuple):
    """A forward pass: its graph, how often each module runs, and what the tracer noted."""

    graph: fx.Graph
    calls: Counter[nn.Module]
    tracer: _Tracer

    def is_read(self, module: nn.Module) -> bool:
        """Whether others read the module's tensors."""
        return any(id(t) in self.tracer.read for t in chain(module.parameters(), module.buffers()))

    def lowers(self, module: nn.Module) -> bool:
        """Whether autocast casts the module's weights, and nobody else would see them cast."""
        return module in self.tracer.lowered - self.tracer.full_precision and not self.is_read(module)


def trace(network: nn.Module) -> Trace:
    """Trace a model in eval mode.

    Raises:
        Exception: Whatever a forward raises that does not run on symbols.
    """
    if "forward" in vars(network):
        raise ValueError("its forward was replaced on the instance, which a trace does not follow")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(network.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    device = device_of(network)
    # a forward that draws random numbers would draw them now
    untouched = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with untouched, torch.autocast(device.type), torch.enable_grad():
        try:
            tracer = _Tracer(device, (_ConvNd, _BatchNorm))
            graph = tracer.trace(network, defaults or None)
        except Exception:  # control flow on values: it may lie in a head that holds convolutions but no BatchNorm
            tracer = _Tracer(device, (_BatchNorm,))
            graph = tracer.trace(network, defaults or None)
    called = [network.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"]
    return Trace(graph, Counter(inner for module in called for inner in module.modules()), tracer)


def foldable_pairs(network: nn.Module, trace: Trace) -> list[tuple[nn.Module, nn.Module]]:
    """Return (convolution, BatchNorm) wherever the one feeds the other and nothing else."""
    convs, norms = _foldable_convs(), foldable_norms()
    pairs = []
    for node in trace.graph.nodes:
        source = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        conv, norm = network.get_submodule(source.target), network.get_submodule(node.target)
        if (
            is_exactly(conv, convs)
            and is_exactly(norm, norms)
            and trace.calls[conv] == trace.calls[norm] == 1
            and not (trace.is_read(conv) or trace.is_read(norm))
            and norm.running_mean is not None
            and norm.num_features == conv.out_channels
        ):
            pairs.append((conv, norm))
    return pairs


def foldable_norms() -> tuple[type, ...]:
    """Return the BatchNorms of images whose forward is known: torch's, and timm's with its activation inside."""
    return nn.BatchNorm2d, nn.SyncBatchNorm, *_loaded("timm.layers.norm_act", "BatchNormAct2d")


def _foldable_convs() -> tuple[type, ...]:
    """Return the convolutions that are linear in their weight: torch's, and timm's that pads as TensorFlow does."""
    return nn.Conv2d, *_loaded("timm.layers.conv2d_same", "Conv2dSame")


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """Return a class of a package, if somebody has imported it."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def module_of(network: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node of a trace calls, or None."""
    return network.get_submodule(node.target) if node.op == "call_module" else None


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes in or out of the module."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def are_all_hooked() -> bool:
    """Whether somebody watches or changes what goes in or out of every module there is."""
    return any(getattr(nn.modules.module, hooks) for hooks in _GLOBAL_HOOKS)


def is_exactly(module: nn.Module, types: tuple[type, ...]) -> bool:
    """Whether a module is of one of these very types, and nobody hooks, overrides or reparametrizes it."""
    parameters = module._parameters.values()
    return (
        type(module) in types
        and not is_hooked(module)
        and "forward" not in vars(module)
        and "weight" in module._parameters
        and all(p is None or type(p) is nn.Parameter for p in parameters)
    )
