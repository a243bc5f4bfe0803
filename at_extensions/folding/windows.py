"""Logits of images of which only a window has changed, from what is known of the rest.

A convolution, a pooling or an activation carries a change no further than its kernel reaches. So while the changed part
is small, layers are computed there alone, on what was remembered of the unchanged image around it; from where it has
grown too large, the network goes on as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from at_extensions.folding.convolution import FastConv2d
from at_extensions.folding.layers import EvalNorm, FoldedNorm, does_nothing
from at_extensions.folding.onednn import padding_of
from at_extensions.folding.tracing import are_all_hooked, is_exactly, is_hooked, module_of, trace

_LARGEST = 0.75  # share of a map beyond which a window of it takes about as long as all of it

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
        """Where it lies as seen from ``outer``'s corner."""
        down, along = outer.top, outer.left
        return Rectangle(self.top - down, self.bottom - down, self.left - along, self.right - along)

    def clipped(self, sides: tuple[int, int]) -> Rectangle:
        """What of it lies in a map of so many rows and columns."""
        return Rectangle(max(self.top, 0), min(self.bottom, sides[0]), max(self.left, 0), min(self.right, sides[1]))

    def overlap(self, other: Rectangle) -> Rectangle | None:
        """What is in both, if anything."""
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


class _Pointwise(NamedTuple):
    """A layer each of whose numbers depends on those at the same place alone."""

    function: Callable


class _Sliding(NamedTuple):
    """A layer that slides a kernel over its input.

    Attributes:
        function: Maps inputs, padded already, to outputs.
        reach: Rows and columns that an output number depends on.
        stride: Of both sides.
        padding: Of both sides.
        filling: What the padding holds.
    """

    function: Callable
    reach: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    filling: float = 0.0

    def whole(self, sides: tuple[int, int]) -> tuple[int, int]:
        """How many rows and columns of outputs there are for so many of inputs."""
        return tuple((n + 2 * p - r) // s + 1 for n, p, r, s in zip(sides, self.padding, self.reach, self.stride))

    def widest(self, sides: tuple[int, int], wholes: tuple[int, int]) -> tuple[int, int]:
        """How many rows and columns of outputs (``wholes`` are all) depend on so many of the inputs, at most."""
        spread = ((side + r - 2) // s + 1 for side, r, s in zip(sides, self.reach, self.stride))
        return tuple(map(min, spread, wholes))

    def outputs(self, changed: Rectangle, wholes: tuple[int, int]) -> Rectangle:
        """Which outputs depend on the changed inputs: at least one, even if none does."""
        ends = []
        for side, (whole, reach, stride, padding) in enumerate(zip(wholes, self.reach, self.stride, self.padding)):
            first = -((reach - 1 - padding - changed[2 * side]) // stride)
            last = (changed[2 * side + 1] - 1 + padding) // stride
            first = min(max(first, 0), whole - 1)
            ends += [first, max(min(last, whole - 1), first) + 1]
        return Rectangle(*ends)

    def inputs(self, outputs: Rectangle) -> Rectangle:
        """Which inputs those outputs depend on, as if there were some beyond the borders."""
        ends = []
        for side, (reach, stride, padding) in enumerate(zip(self.reach, self.stride, self.padding)):
            first = outputs[2 * side] * stride - padding
            ends += [first, (outputs[2 * side + 1] - 1) * stride - padding + reach]
        return Rectangle(*ends)


class Windows:
    """A twin's network that remembers images, to tell the logits of them with a window changed.

    What is computed is what the network computes, up to rounding, as far as a trace shows it: of ``a += b`` it shows
    ``a + b``, so compare a look with the network's own answer before you rely on others. What convolutions and sums
    read is remembered: no more than a graph for gradients would hold.

    Args:
        network: The network of a ``FoldedTwin``.
        autocast: What it computes in, if under autocast.
        channels_last: Whether it computes in that layout.

    Raises:
        Exception: Whatever the trace does, for a model that cannot be traced.
        ValueError: Hooks that would not be called, or a layer that overwrites what others still read.
    """

    def __init__(self, network: nn.Module, *, autocast: torch.dtype | None, channels_last: bool):
        if is_hooked(network) or are_all_hooked():
            raise ValueError("its hooks would not be called")
        self._network, self._autocast = network, autocast
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._graph = trace(network).graph  # its nodes live as long as it
        self._nodes = list(self._graph.nodes)
        self._steps = {node: _step(network, node) for node in self._nodes}
        _check_writes(network, self._nodes, self._steps)
        last_reader = {arg: node for node in self._nodes for arg in node.all_input_nodes}
        self._done = {node: [arg for arg in node.all_input_nodes if last_reader[arg] is node] for node in self._nodes}
        self._forget()

    @property
    def saves(self) -> bool:
        """Whether any layer with a kernel is computed in windows of the size that was said."""
        return any(isinstance(self._steps[node], _Sliding) for node in self._wholes)

    @torch.no_grad()
    def remember(self, images: Tensor, size: int) -> Tensor:
        """Remember images (B, C, H, W), to look at changes of ``size`` x ``size`` pixels; return the logits (B, K)."""
        self._forget()
        images = images.clone(memory_format=self._layout)
        self._size = size
        logits = self._compute(images, Rectangle.whole(images))
        self._images = {node: window for node, (window, _) in self._seen.items()}
        self._seen = {}
        return logits

    @torch.no_grad()
    def look(self, window: Tensor, top: int, left: int) -> Tensor:
        """Return the logits (B, K) of the remembered images with a window (B, C, h, w) put in at a corner."""
        rectangle = Rectangle(top, top + window.shape[2], left, left + window.shape[3])
        return self._compute(window.contiguous(memory_format=self._layout), rectangle)

    @torch.no_grad()
    def accept(self, rows: Tensor) -> None:
        """Remember some of the images (their numbers) as the last look saw them.

        Raises:
            RuntimeError: There was no look since images were remembered.
        """
        if not self._seen:
            raise RuntimeError("nothing to accept: look() comes first")
        for node, images in self._images.items():
            window, rectangle = self._seen[node]
            rectangle.of(images)[rows] = window[rows]

    def _forget(self) -> None:
        self._size = 0
        self._images: dict[fx.Node, Tensor] = {}  # what layers return for the remembered images
        self._wholes: dict[fx.Node, tuple[int, int]] = {}  # layers computed in windows -> rows and columns of it all
        self._widest: dict[fx.Node, tuple[int, int]] = {}  # and of their windows, at most
        self._constants: dict[fx.Node, Any] = {}  # what does not depend on images
        self._seen: dict[fx.Node, tuple[Tensor, Rectangle]] = {}  # what the last pass computed in windows

    def _compute(self, window: Tensor, rectangle: Rectangle) -> Tensor:
        """Run the network; the first time since images were forgotten, decide what to compute in windows."""
        self._seen, values = {}, {}
        with torch.autocast(window.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            for node in self._nodes:
                if node.op == "output":
                    return fx.node.map_arg(node.args[0], lambda arg: self._value(arg, values))
                if node.op == "placeholder":
                    self._read(node, window, rectangle)
                    continue
                if node not in self._wholes and node not in self._constants:
                    self._decide(node, values)
                if node in self._wholes:
                    self._seen[node] = self._in_window(node)
                elif node not in self._constants:
                    values[node] = self._call(node, values)
                for arg in self._done[node]:
                    values.pop(arg, None)
                    if arg in self._seen and not self._is_kept(arg):
                        del self._seen[arg]
        raise AssertionError("a trace ends with its output")

    def _read(self, node: fx.Node, window: Tensor, rectangle: Rectangle) -> None:
        """Take an argument of the network: the images, or another one's default."""
        if node is not self._nodes[0]:
            self._constants[node] = node.args[0] if node.args else None
            return
        if not self._images:
            self._wholes[node] = window.shape[2], window.shape[3]
            self._widest[node] = min(self._size, window.shape[2]), min(self._size, window.shape[3])
        self._seen[node] = window, rectangle

    def _decide(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Whether a layer is a constant, computed in windows, or as a whole."""
        changing = [arg for arg in node.all_input_nodes if arg not in self._constants]
        if not changing:
            self._constants[node] = self._call(node, values)
            return
        step = self._steps[node]
        if step is None or any(arg not in self._wholes for arg in changing):
            return
        wholes, widest = (list({sides[arg]: None for arg in changing}) for sides in (self._wholes, self._widest))
        if len(wholes) > 1:
            return
        widest = tuple(map(max, zip(*widest)))
        if isinstance(step, _Sliding):
            whole = step.whole(wholes[0])
            widest = step.widest(widest, whole)
            if min(whole) < 1 or widest[0] * widest[1] > _LARGEST * whole[0] * whole[1]:
                return
            self._wholes[node], self._widest[node] = whole, widest
        elif all(self._is_even(arg) for arg in node.args if arg not in changing):
            self._wholes[node], self._widest[node] = wholes[0], widest

    def _is_even(self, constant: Any) -> bool:
        """Whether it is the same at every pixel."""
        value = self._constants[constant] if isinstance(constant, fx.Node) else constant
        if not isinstance(value, Tensor):
            return isinstance(value, (int, float))
        return value.ndim == 0 or (value.ndim in (3, 4) and value.shape[-2:] == (1, 1))

    def _is_kept(self, node: fx.Node) -> bool:
        """Whether more than the changed window of what a layer returns is ever needed."""
        return any(
            user not in self._wholes
            or isinstance(self._steps[user], _Sliding)
            or len([arg for arg in user.all_input_nodes if arg in self._wholes]) > 1
            for user in node.users
        )

    def _in_window(self, node: fx.Node) -> tuple[Tensor, Rectangle]:
        """Compute a layer where it changes."""
        step = self._steps[node]
        if isinstance(step, _Pointwise):
            args = [arg for arg in node.all_input_nodes if arg in self._wholes]
            rectangle = self._seen[args[0]][1]
            for arg in args[1:]:
                rectangle = rectangle.joined(self._seen[arg][1])
            inputs = fx.node.map_arg(
                node.args,
                lambda arg: self._region(arg, rectangle) if arg in self._wholes else self._constants[arg],
            )
            return step.function(*inputs), rectangle
        (source,) = node.args
        outputs = step.outputs(self._seen[source][1], self._wholes[node])
        wanted = step.inputs(outputs)
        there = wanted.clipped(self._wholes[source])
        cut = self._region(source, there)
        if there != wanted:
            borders = (there.left - wanted.left, wanted.right - there.right)
            borders += (there.top - wanted.top, wanted.bottom - there.bottom)
            cut = F.pad(cut, borders, value=step.filling)
        return step.function(cut), outputs

    def _region(self, node: fx.Node, wanted: Rectangle) -> Tensor:
        """What a layer returns in a rectangle, changed or not."""
        window, changed = self._seen[node]
        if wanted == changed:
            return window
        overlap = wanted.overlap(changed)
        if overlap == wanted:
            return wanted.within(changed).of(window)
        cut = wanted.of(self._images[node]).clone(memory_format=self._layout)
        if overlap is not None:
            overlap.within(wanted).of(cut).copy_(overlap.within(changed).of(window))
        return cut

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """What a layer returns as a whole, in memory that whoever reads it last may overwrite."""
        if node in self._constants:
            return self._constants[node]
        if node not in values:
            window, rectangle = self._seen[node]
            if (0, 0, *self._wholes[node]) == (rectangle.top, rectangle.left, rectangle.bottom, rectangle.right):
                values[node] = window.clone()
            else:
                values[node] = self._images[node].clone()
                rectangle.of(values[node]).copy_(window)
        return values[node]

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Run a layer as the network does."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: self._value(arg, values))
        if node.op == "call_module":
            return self._network.get_submodule(node.target)(*args, **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self._network)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def _same(x: Tensor) -> Tensor:
    return x


def _step(network: nn.Module, node: fx.Node) -> _Pointwise | _Sliding | None:
    """How a layer's changes follow from those of what it reads; None if nobody knows."""
    module = module_of(network, node)
    if module is None:
        known = node.op in ("call_function", "call_method") and not node.kwargs.keys() - {"inplace"}
        known = known and not any(isinstance(arg, (bool, tuple, list, dict)) for arg in node.args)
        function = _FUNCTIONS.get(node.target) if known else None
        return None if function is None else _Pointwise(function)
    if len(node.args) != 1 or node.kwargs:
        return None
    sliding = _sliding(module)
    if sliding is not None:
        return sliding
    function = _pointwise(module)
    return None if function is None else _Pointwise(function)


def _sliding(module: nn.Module) -> _Sliding | None:
    if is_exactly(module, (FastConv2d, nn.Conv2d)):
        padding = padding_of(module)
        if padding is None or module.padding_mode != "zeros":
            return None
        reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size)]
        stride, dilation, groups = module.stride, module.dilation, module.groups
        return _Sliding(
            lambda x: F.conv2d(x, module.weight, module.bias, stride, 0, dilation, groups),
            tuple(reach), stride, tuple(padding),
        )  # fmt: skip
    if is_hooked(module) or "forward" in vars(module) or getattr(module, "ceil_mode", True):
        return None
    sides = [tuple(_both(getattr(module, name, 0))) for name in ("kernel_size", "stride", "padding")]
    if type(module) is nn.MaxPool2d and _both(module.dilation) == [1, 1] and not module.return_indices:
        return _Sliding(lambda x: F.max_pool2d(x, *sides[:2]), *sides, filling=-torch.inf)
    padded = any(sides[2])
    if type(module) is nn.AvgPool2d and module.divisor_override is None and (module.count_include_pad or not padded):
        return _Sliding(lambda x: F.avg_pool2d(x, *sides[:2]), *sides)
    return None


def _both(side: int | tuple[int, int]) -> list[int]:
    return [side, side] if isinstance(side, int) else list(side)


def _pointwise(module: nn.Module) -> Callable | None:
    """A layer that acts on every pixel by itself, not in place; None if it is none."""
    if is_hooked(module) or "forward" in vars(module):
        return None
    if does_nothing(module):
        return _same
    if type(module) in _ACTIVATIONS:
        return _ACTIVATIONS[type(module)](module)
    if type(module) in (FoldedNorm, EvalNorm):
        inner = [_pointwise(part) for part in module._modules.values()]
        if any(part is None for part in inner):
            return None
        return module if type(module) is EvalNorm else _chain(inner)
    if type(module) is nn.Sequential:
        parts = [_pointwise(part) for part in module]
        return None if any(part is None for part in parts) else _chain(parts)
    return None


def _chain(functions: list[Callable]) -> Callable:
    def chained(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return chained


def _check_writes(network: nn.Module, nodes: list[fx.Node], steps: dict) -> None:
    """See to it that nobody reads what a layer has overwritten; windows are not overwritten, so it would differ.

    Raises:
        ValueError: Somebody does.
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
        is_fresh = isinstance(step, _Sliding) or (isinstance(step, _Pointwise) and step.function is not _same)
        if writes or not is_fresh:
            for arg in node.all_input_nodes:
                shared[node] |= shared[arg]
            for other in shared[node]:
                shared[other] = shared[node]


def _writes(network: nn.Module, node: fx.Node) -> bool:
    """Whether a layer may overwrite the first tensor that it reads."""
    module = module_of(network, node)
    if module is not None:  # what BatchNorm's activation overwrites is BatchNorm's own
        return type(module) is not EvalNorm and any(getattr(part, "inplace", False) for part in module.modules())
    if node.op == "call_method":
        return node.target == "__setitem__" or (node.target.endswith("_") and not node.target.endswith("__"))
    return node.op == "call_function" and (
        node.target in _WRITERS
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
        or any(arg is True for arg in node.args)
    )
