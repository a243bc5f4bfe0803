"""Parts of a kernel: tensors kept for all samples of one layer, and their contraction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from at_extensions.analysis.ntk._accumulator import Accumulator, block_rows
from at_extensions.analysis.ntk._gram import pixel_gram, unfolded_gram
from at_extensions.analysis.ntk._layers import norm_rows, output_gradient, pixels, unfold, weight_gradient
from at_extensions.analysis.ntk._passes import Call
from at_extensions.analysis.ntk._probe import Layer

Captured = Sequence[tuple[Call, Sequence[Tensor]]]
"""Calls of a layer on one batch, with the gradients of their outputs in each backward pass."""


class Rows:
    """Gradients of single samples for some of a layer's parameters, (N, A, p): K += J J^T.

    Args:
        layer: The layer.
        keys: ``"weight"``, ``"bias"``, or both.
    """

    route = "J-dot"

    def __init__(self, layer: Layer, keys: Sequence[str]):
        self.layer, self.keys = layer, tuple(keys)
        self.size = sum(layer.module._parameters[key].numel() for key in keys)
        self._kept: list[Tensor] = []

    def allocate(self, counts: Sequence[int], passes: int, like: Tensor) -> None:
        """Make room for the samples of both sides."""
        self._kept = [like.new_empty(n, passes, self.size) for n in counts]

    def take(self, side: int, samples: slice, captured: Captured, limit: int) -> None:
        """Keep the part of a batch."""
        for part, rows in self.rows(captured, samples.stop - samples.start, limit):
            start = samples.start + part.start
            self._kept[side][start : start + len(rows)] = rows

    def rows(self, captured: Captured, batch: int, limit: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the gradients (b, A, p) of ranges of a batch, formed within about ``limit`` bytes."""
        module, passes = self.layer.module, range(len(captured[0][1]))
        if self.layer.is_norm:
            each = [[norm_rows(module, call, ds[a], batch) for call, ds in captured] for a in passes]
            rows = [torch.cat([sum(f[key] for f in found) for key in self.keys], 1) for found in each]
            yield slice(0, batch), torch.stack(rows, 1)
            return
        inputs = [pixels(module, call, batch) for call, _ in captured]
        outputs = [[output_gradient(module, d, batch) for d in ds] for _, ds in captured]
        step = max(1, limit // max(1, self.forming(len(passes), outputs[0][0].element_size())))
        for start in range(0, batch, step):
            part, found = slice(start, min(start + step, batch)), {}
            stacked = [torch.stack([d[part] for d in ds], 1) for ds in outputs]
            if "weight" in self.keys:  # an unfolded input serves every backward pass
                pairs = zip(inputs, stacked)
                found["weight"] = sum(weight_gradient(unfold(x[part], w), d) for (x, w), d in pairs).flatten(2)
            if "bias" in self.keys:
                found["bias"] = sum(d.sum(3) for d in stacked)
            yield part, torch.cat([found[key] for key in self.keys], 2)

    def forming(self, passes: int, itemsize: int) -> int:
        """Return the bytes in use while the gradients of one sample are formed."""
        outputs = 0 if self.layer.is_norm else self.layer.positions * len(self.layer.module.weight)
        return itemsize * (passes * (4 * self.size + 2 * outputs) + _unfolded(self.layer))

    def least(self, samples: int, passes: int, itemsize: int) -> int:
        """Return the least bytes of work space."""
        return self.forming(passes, itemsize)

    def kept(self, passes: int, itemsize: int) -> int:
        """Return the bytes kept for each sample."""
        return itemsize * passes * self.size

    def contract(self, total: Accumulator, limit: int) -> None:
        """Add this part to the kernel, and discard it."""
        total.add_rows(self._kept[0], self._kept[-1])
        self._kept = []


class Pixels:
    """Inputs and output gradients of a linear layer or convolution: its weight's part, by one of several routes.

    Args:
        layer: The layer.
        route: ``"Gram"``, ``"pixel Gram"``, ``"unfolded Gram"``: products of the inputs' and of the output gradients'
            Gram matrices; or ``"J-dot"``: gradients of single samples, formed for a few output channels at a time.
        with_bias: Add the bias's part too, which is that of an input of one; for a Gram route.
    """

    def __init__(self, layer: Layer, route: str, with_bias: bool = False):
        self.layer, self.route, self._with_bias = layer, route, with_bias
        self.keys = ("weight", "bias") if with_bias else ("weight",)
        weight = layer.module.weight
        self.channels, self.size = len(weight), weight.numel() + (len(weight) if with_bias else 0)
        self._columns = weight.numel() // len(weight)
        self._x: list[list[Tensor]] = []
        self._d: list[Tensor] = []

    def allocate(self, counts: Sequence[int], passes: int, like: Tensor) -> None:
        """Make room for the samples of both sides."""
        self._x = [[like.new_empty(n, *side) for side in self.layer.sides] for n in counts]
        self._d = [like.new_empty(n, passes, self.channels, self.layer.positions) for n in counts]

    def take(self, side: int, samples: slice, captured: Captured, limit: int) -> None:
        """Keep the part of a batch."""
        batch, module, at = samples.stop - samples.start, self.layer.module, 0
        for kept, (call, ds) in zip(self._x[side], captured):
            kept[samples] = pixels(module, call, batch)[0]
            for a, d in enumerate(ds):
                part = output_gradient(module, d, batch)
                self._d[side][samples, a, :, at : at + part.shape[2]] = part
            at += part.shape[2]

    def least(self, samples: int, passes: int, itemsize: int) -> int:
        """Return the least bytes of work space, for a kernel of as many rows and columns together."""
        if self.route == "J-dot":
            return 2 * itemsize * (samples * passes * self._columns + _unfolded(self.layer))
        inputs = max(sum(c * h * w for c, h, w in self.layer.sides), _unfolded(self.layer))
        return 4 * itemsize * (self._side**2 + inputs + passes * self.channels * self.layer.positions)

    @property
    def _side(self) -> int:
        """Positions along one axis of the largest Gram matrix."""
        return max(self.layer.positions, *(h * w for _, h, w in self.layer.sides))

    def kept(self, passes: int, itemsize: int) -> int:
        """Return the bytes kept for each sample."""
        inputs = sum(c * h * w for c, h, w in self.layer.sides)
        return itemsize * (inputs + passes * self.channels * self.layer.positions)

    def contract(self, total: Accumulator, limit: int) -> None:
        """Add this part to the kernel, and discard it."""
        if self.route == "J-dot":
            for channels in self._slices(limit):
                rows = [self._form(side, channels, limit // 4) for side in range(len(self._d))]
                total.add_rows(rows[0], rows[-1])
        else:
            left, right = self._d[0], self._d[-1]
            rows = block_rows(self._side, min(limit, _CACHE), total.dtype.itemsize)
            total.add_pixels(self._inputs(total.dtype), left, right, rows)
        self._x, self._d = [], []

    def _inputs(self, dtype: torch.dtype) -> Callable[[slice, slice], Tensor]:
        windows = self.layer.windows

        def gram(i: slice, j: slice) -> Tensor:
            xs, ys = [x[i].to(dtype) for x in self._x[0]], [y[j].to(dtype) for y in self._x[-1]]
            if self.route == "unfolded Gram":
                return unfolded_gram(xs, ys, windows)
            found = pixel_gram(xs[0], ys[0], windows[0])
            return found.add_(1) if self._with_bias else found

        return gram

    def _slices(self, limit: int) -> Iterator[slice]:
        """Yield ranges of output channels whose gradients of all samples fit half of ``limit``."""
        each = sum(len(d) for d in self._d) * self._d[0].shape[1] * self._columns * self._d[0].element_size()
        step = max(1, limit // 2 // each)
        for start in range(0, self.channels, step):
            yield slice(start, min(start + step, self.channels))

    def _form(self, side: int, channels: slice, limit: int) -> Tensor:
        """Return the gradients of all samples for some output channels, (N, A, p)."""
        xs, d, layer = self._x[side], self._d[side], self.layer
        rows = d.new_empty(len(d), d.shape[1], channels.stop - channels.start, self._columns)
        step = max(1, limit // (d.element_size() * _unfolded(layer)))
        for start in range(0, len(d), step):
            part = slice(start, start + step)
            columns = torch.cat([unfold(x[part], w) for x, w in zip(xs, layer.windows)], 3)
            rows[part] = weight_gradient(columns, d[part, :, channels])
        return rows.flatten(2)


_CACHE = 16 * 2**20
"""Bytes of a block's Gram matrices over pairs of positions: blocks that stay in a CPU's cache are faster."""

Unit = Rows | Pixels


def _unfolded(layer: Layer) -> int:
    """Return the numbers in the unfolded input of one sample."""
    if layer.is_norm:
        return 0
    return sum(
        c * w.kernel[0] * w.kernel[1] * w.side(height, 0) * w.side(width, 1)
        for (c, height, width), w in zip(layer.sides, layer.windows)
    )
