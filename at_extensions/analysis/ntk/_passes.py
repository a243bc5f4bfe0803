"""Forward passes that record the inputs of layers, and backward passes through activations alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call


class Call(NamedTuple):
    """One call of a layer in a forward pass.

    Attributes:
        layer: Name of the module.
        x: Its input.
        shape: Shape of its output.
        edge: Where the gradient of its output arrives.
        statistics: BatchNorm's running mean and variance, of the pass's floating-point type.
    """

    layer: str
    x: Tensor
    shape: torch.Size
    edge: GradientEdge
    statistics: tuple[Tensor, Tensor] | None


class Network:
    """A model that runs on weights which need no gradient, in a floating-point type of choice; it keeps its own.

    Args:
        model: The model, inside the ``untouched`` context.
        dtype: Type of weights, buffers and images; None keeps the model's.

    Attributes:
        weights: Each parameter under its first name, detached, in ``dtype``.
        dtype: Type of the images.
        device: Device of the first parameter.
        copied: Bytes of the copies that another ``dtype`` needs.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        self.model = model
        self.weights = {name: _cast(p.detach(), dtype) for name, p in model.named_parameters()}
        self._buffers = {name: _cast(b.detach(), dtype) for name, b in model.named_buffers()}
        first = next((p for p in self.weights.values() if p.is_floating_point()), torch.zeros(0))
        self.dtype, self.device = dtype or first.dtype, first.device
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        now = self.weights | self._buffers
        self.copied = sum(t.nbytes for name, t in now.items() if t.data_ptr() != own[name].data_ptr())

    def __call__(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits of a batch, on some other weights than the model's."""
        return functional_call(self.model, {**self.weights, **self._buffers, **(weights or {})}, (x,))

    def batch(self, x: Tensor) -> Tensor:
        """Return images on the model's device, in the pass's floating-point type."""
        x = x.clone() if x.is_inference() else x  # outside inference mode, the copy may have a gradient
        return x.to(self.device, self.dtype) if x.is_floating_point() else x.to(self.device)

    def record(
        self, x: Tensor, layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, list[Call]]:
        """Return the logits of a batch, with their graph, and the calls of some layers in order."""
        with torch.enable_grad(), _recording(layers) as calls:
            if x.is_floating_point():
                x = x.detach().requires_grad_().clone()  # no leaf: the model may change its input in place
            return self(x, weights), calls


def gradients(logits: Tensor, cotangent: Tensor, calls: Sequence[Call], *, keep: bool) -> list[Tensor]:
    """Return the gradient of the sum of ``logits * cotangent`` for the output of each call.

    Args:
        logits: (B, K), with their graph.
        cotangent: (K,) or (B, K).
        calls: Calls of the pass.
        keep: Keep the graph for another backward pass.
    """
    if not calls:
        return []
    with torch.enable_grad():
        total = (logits * cotangent).sum()
    found = torch.autograd.grad(total, [call.edge for call in calls], retain_graph=keep, allow_unused=True)
    return [call.x.new_zeros(call.shape) if d is None else d.detach() for d, call in zip(found, calls)]


@contextlib.contextmanager
def _recording(layers: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    calls: list[Call] = []
    handles = [m.register_forward_hook(_recorder(n, calls), with_kwargs=True) for n, m in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _recorder(name: str, calls: list[Call]):
    def record(module: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
        x = args[0] if args else kwargs.get("input")
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and torch.is_grad_enabled()):
            return None
        replaced = None
        if not output.requires_grad:  # a first layer on inputs without gradient, such as tokens
            replaced = output = output.detach().requires_grad_().clone()
        statistics = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            statistics = module.running_mean, module.running_var
        calls.append(Call(name, x.detach(), output.shape, get_gradient_edge(output), statistics))
        return replaced  # None keeps the module's own output

    return record


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
