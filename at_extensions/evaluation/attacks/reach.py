"""How far the layers of a traced network carry a change: to the same place, or as far as a kernel reaches."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from at_extensions.folding.backends import convolution_types
from at_extensions.folding.layers import FoldedNorm, does_nothing, padding_of
from at_extensions.folding.tracing import foldable_norms, is_exactly, is_hooked, module_of

_ACTIVATIONS = {  # modules that act on every number by itself -> the same, not in place
    nn.ReLU: lambda module: F.relu,
    nn.ReLU6: lambda module: F.relu6,
    nn.SiLU: lambda module: F.silu,
    nn.Mish: lambda module: F.mish,
    nn.Hardswish: lambda module: F.hardswish,
    nn.Hardsigmoid: lambda module: F.hardsigmoid,
    nn.GELU: lambda module: module,
    nn.Sigmoid: lambda module: module,
    nn.Softplus: lambda module: module,
    nn.Tanh: lambda module: module,
    nn.ELU: lambda module: lambda x: F.elu(x, module.alpha),
    nn.LeakyReLU: lambda module: lambda x: F.leaky_relu(x, module.negative_slope),
    nn.Dropout: lambda module: _same,
    nn.Dropout2d: lambda module: _same,
}
_FUNCTIONS = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), F.relu),
    **dict.fromkeys((F.silu, "silu"), F.silu),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), torch.sigmoid),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), torch.tanh),
    **dict.fromkeys((F.leaky_relu,), F.leaky_relu),
    **dict.fromkeys((F.gelu,), F.gelu),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), operator.add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), operator.sub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), operator.mul),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), operator.truediv),
}
_WRITERS = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imatmul}
_WRITERS |= {operator.setitem, F.relu_, torch.relu_}


class Rectangle(NamedTuple):
    """Rows from ``top`` to before ``bottom``, columns from ``left`` to before ``right``."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, images: Tensor) -> Tensor:
        """The part of maps (B, C, H, W)."""
        return images[:, :, self.top : self.bottom, self.left : self.right]

    def within(self, outer: Rectangle) -> Rectangle:
        """Its place relative to ``outer``'s corner."""
        down, along = outer.top, outer.left
        return Rectangle(self.top - down, self.bottom - down, self.left - along, self.right - along)

    def clipped(self, sides: tuple[int, int]) -> Rectangle:
        """The part of it inside a map of so many rows and columns."""
        return Rectangle(max(self.top, 0), min(self.bottom, sides[0]), max(self.left, 0), min(self.right, sides[1]))

    def overlap(self, other: Rectangle) -> Rectangle | None:
        """The part that is in both, or None."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Rectangle(top, bottom, left, right) if top < bottom and left < right else None

    @staticmethod
    def whole(images: Tensor) -> Rectangle:
        """All of maps (B, C, H, W)."""
        return Rectangle(0, images.shape[2], 0, images.shape[3])

    def joined(self, other: Rectangle) -> Rectangle:
        """The smallest rectangle around both."""
        lower, upper = zip(*((min(a, b), max(a, b)) for a, b in zip(self, other)))
        return Rectangle(lower[0], upper[1], lower[2], upper[3])


class Pointwise(NamedTuple):
    """A layer each of whose numbers depends on those at the same place alone."""

    function: Callable


class Sliding(NamedTuple):
    """A layer that slides a kernel over its input.

    Attributes:
        function: Maps inputs, padded already, to outputs.
        reach: Rows and columns that an output number depends on.
        stride: Of both sides.
        padding: Of both sides.
        filling: The value of the padding.
    """

    function: Callable
    reach: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    filling: float = 0.0

    def whole(self, sides: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of outputs for so many of inputs."""
        sizes = zip(sides, self.reach, self.stride, self.padding)
        return tuple((side + 2 * padding - reach) // stride + 1 for side, reach, stride, padding in sizes)

    def widest(self, sides: tuple[int, int], wholes: tuple[int, int]) -> tuple[int, int]:
        """Return how many rows and columns of outputs (``wholes`` are all) depend on so many of the inputs, at most."""
        spread = ((side + r - 2) // s + 1 for side, r, s in zip(sides, self.reach, self.stride))
        return tuple(map(min, spread, wholes))

    def outputs(self, changed: Rectangle, wholes: tuple[int, int]) -> Rectangle:
        """Return the outputs that depend on the changed inputs: at least one, even if none does."""
        ends = []
        for side, (whole, reach, stride, padding) in enumerate(zip(wholes, self.reach, self.stride, self.padding)):
            first = -((reach - 1 - padding - changed[2 * side]) // stride)
            last = (changed[2 * side + 1] - 1 + padding) // stride
            first = min(max(first, 0), whole - 1)
            ends += [first, max(min(last, whole - 1), first) + 1]
        return Rectangle(*ends)

    def inputs(self, outputs: Rectangle) -> Rectangle:
        """Return the inputs those outputs depend on, as if there were some beyond the borders."""
        ends = []
        for side, (reach, stride, padding) in enumerate(zip(self.reach, self.stride, self.padding)):
            first = outputs[2 * side] * stride - padding
            ends += [first, (outputs[2 * side + 1] - 1) * stride - padding + reach]
        return Rectangle(*ends)


def _same(x: Tensor) -> Tensor:
    return x


def step_of(network: nn.Module, node: fx.Node) -> Pointwise | Sliding | None:
    """Return how a layer's changes follow from its input's; None if that is not known."""
    module = module_of(network, node)
    if module is None:
        known = node.op in ("call_function", "call_method") and not node.kwargs.keys() - {"inplace"}
        known = known and not any(isinstance(arg, (bool, tuple, list, dict)) for arg in node.args)
        function = _FUNCTIONS.get(node.target) if known else None
        return None if function is None else Pointwise(function)
    if len(node.args) != 1 or node.kwargs:
        return None
    sliding = _sliding(module)
    if sliding is not None:
        return sliding
    function = _pointwise(module)
    return None if function is None else Pointwise(function)


def _sliding(module: nn.Module) -> Sliding | None:
    if is_exactly(module, convolution_types()):
        padding = padding_of(module)
        if padding is None or module.padding_mode != "zeros":
            return None
        reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size)]
        stride, dilation, groups = module.stride, module.dilation, module.groups
        return Sliding(
            lambda x: F.conv2d(x, module.weight, module.bias, stride, 0, dilation, groups),
            tuple(reach), stride, tuple(padding),
        )  # fmt: skip
    if is_hooked(module) or "forward" in vars(module) or getattr(module, "ceil_mode", True):
        return None
    sides = [tuple(_both(getattr(module, name, 0))) for name in ("kernel_size", "stride", "padding")]
    if type(module) is nn.MaxPool2d and _both(module.dilation) == [1, 1] and not module.return_indices:
        return Sliding(lambda x: F.max_pool2d(x, *sides[:2]), *sides, filling=-torch.inf)
    padded = any(sides[2])
    if type(module) is nn.AvgPool2d and module.divisor_override is None and (module.count_include_pad or not padded):
        return Sliding(lambda x: F.avg_pool2d(x, *sides[:2]), *sides)
    return None


def _both(side: int | tuple[int, int]) -> list[int]:
    return [side, side] if isinstance(side, int) else list(side)


def _pointwise(module: nn.Module) -> Callable | None:
    """Return a layer that acts on every pixel by itself, not in place; None if it is none."""
    if is_hooked(module) or "forward" in vars(module):
        return None
    if does_nothing(module):
        return _same
    if type(module) in _ACTIVATIONS:
        return _ACTIVATIONS[type(module)](module)
    if type(module) is FoldedNorm or _is_frozen_norm(module):
        inner = [_pointwise(part) for part in module._modules.values()]
        if any(part is None for part in inner):
            return None
        return _chain(inner) if type(module) is FoldedNorm else module
    if type(module) is nn.Sequential:
        parts = [_pointwise(part) for part in module]
        return None if any(part is None for part in parts) else _chain(parts)
    return None


def _is_frozen_norm(module: nn.Module) -> bool:
    """Whether a layer is a BatchNorm that normalises by running statistics."""
    return type(module) in foldable_norms() and not module.training and module.running_mean is not None


def _chain(functions: list[Callable]) -> Callable:
    functions = [function for function in functions if function is not _same]
    if not functions:
        return _same

    def chained(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return chained


def check_writes(network: nn.Module, nodes: list[fx.Node], steps: dict) -> None:
    """Refuse networks that read a tensor after a layer has overwritten it: windows are not overwritten.

    Raises:
        ValueError: The network does.
    """
    place = {node: number for number, node in enumerate(nodes)}
    shared: dict[fx.Node, set[fx.Node]] = {}  # nodes that may have the same memory
    for node in nodes:
        shared[node] = {node}
        writes = _writes(network, node)
        if writes:
            for other in set().union(*(shared[arg] for arg in node.all_input_nodes[:1])):
                if any(place[user] > place[node] for user in other.users):
                    raise ValueError(f"{node} overwrites {other}, which is read later")
        step = steps[node]
        is_fresh = isinstance(step, Sliding) or (isinstance(step, Pointwise) and step.function is not _same)
        if writes or not is_fresh:
            for arg in node.all_input_nodes:
                shared[node] |= shared[arg]
            for other in shared[node]:
                shared[other] = shared[node]


def _writes(network: nn.Module, node: fx.Node) -> bool:
    """Whether a layer may overwrite the first tensor that it reads."""
    module = module_of(network, node)
    if module is not None:  # what BatchNorm's activation overwrites is BatchNorm's own
        return not _is_frozen_norm(module) and any(getattr(part, "inplace", False) for part in module.modules())
    if node.op == "call_method":
        return node.target == "__setitem__" or (node.target.endswith("_") and not node.target.endswith("__"))
    return node.op == "call_function" and (
        node.target in _WRITERS
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
        or any(arg is True for arg in node.args)
    )
