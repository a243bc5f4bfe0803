"""Logits of images of which only a window has changed, from what is known of the rest.

A convolution, a pooling or an activation carries a change no further than its kernel reaches. So while the changed part
is small, layers are computed there alone, on what was remembered of the unchanged image around it; from where it has
grown too large, the network goes on as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from at_extensions.evaluation.attacks.reach import Pointwise, Rectangle, Sliding, check_writes, step_of
from at_extensions.evaluation.searching import twin_in
from at_extensions.folding import FoldedTwin, warn_once
from at_extensions.folding.tracing import are_all_hooked, is_hooked, trace

_LARGEST = 0.75  # share of a map beyond which a window of it takes about as long as all of it


def windows_of(search: Callable[[Tensor], Tensor]) -> Windows | None:
    """Return an evaluator of logits after a local image change, if ``search`` is a twin that has one.

    On a CPU alone, where it was measured to be faster; on other devices, None.
    """
    twin = twin_in(search)
    if twin is None or twin.device.type != "cpu":
        return None
    try:
        return Windows(twin)
    except Exception as error:  # whatever a foreign model's trace may raise
        warn_about_windows(search, f"{type(error).__name__}: {error}")
        return None


def warn_about_windows(search: Callable[[Tensor], Tensor], reason: str) -> None:
    """Emit a ``TwinWarning``, once for each model and reason, that Square computes whole images."""
    twin = twin_in(search)
    if twin is not None:
        warn_once(twin.model, f"Square computes whole images: {reason}")


class Windows:
    """An evaluator of a twin's logits after a local change of images that it remembers.

    It computes the twin's logits, up to rounding, as far as a trace shows the computation: of ``a += b`` it shows
    ``a + b``, so compare a look with the twin's own answer before you rely on others. It remembers the inputs of
    convolutions and sums: no more than a graph for gradients would hold. It holds for the twin's present weights.

    Args:
        twin: The twin, refreshed.

    Raises:
        Exception: Whatever the trace does, for a model that cannot be traced.
        ValueError: Hooks that would not be called, or a layer that overwrites what others still read.
    """

    def __init__(self, twin: FoldedTwin):
        network = twin.network
        if is_hooked(network) or are_all_hooked():
            raise ValueError("its hooks would not be called")
        self._network, self._autocast = network, twin.autocast
        self._layout = torch.channels_last if twin.channels_last else torch.contiguous_format
        self._graph = trace(network).graph  # its nodes live as long as it
        self._nodes = list(self._graph.nodes)
        self._steps = {node: step_of(network, node) for node in self._nodes}
        check_writes(network, self._nodes, self._steps)
        last_reader = {arg: node for node in self._nodes for arg in node.all_input_nodes}
        self._done = {node: [arg for arg in node.all_input_nodes if last_reader[arg] is node] for node in self._nodes}
        self._forget()

    @property
    def saves(self) -> bool:
        """Whether any layer with a kernel is computed in windows of the remembered size."""
        return any(isinstance(self._steps[node], Sliding) for node in self._wholes)

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
        self._images: dict[fx.Node, Tensor] = {}  # layers' outputs for the remembered images
        self._wholes: dict[fx.Node, tuple[int, int]] = {}  # layers computed in windows -> rows and columns of it all
        self._widest: dict[fx.Node, tuple[int, int]] = {}  # and of their windows, at most
        self._constants: dict[fx.Node, Any] = {}  # values that do not depend on images
        self._seen: dict[fx.Node, tuple[Tensor, Rectangle]] = {}  # windows that the last pass computed

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
        """Decide whether a layer is a constant, computed in windows, or as a whole."""
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
        if isinstance(step, Sliding):
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
            or isinstance(self._steps[user], Sliding)
            or len([arg for arg in user.all_input_nodes if arg in self._wholes]) > 1
            for user in node.users
        )

    def _in_window(self, node: fx.Node) -> tuple[Tensor, Rectangle]:
        """Compute a layer where it changes."""
        step = self._steps[node]
        if isinstance(step, Pointwise):
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
        """Return a layer's output in a rectangle, changed or not."""
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
        """Return a layer's whole output, in memory that its last reader may overwrite."""
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
