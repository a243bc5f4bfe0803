"""Gradients of single samples for each kind of layer, from its input and the gradient of its output."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from at_extensions.analysis.ntk._passes import Call

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
KINDS = (nn.Linear, *CONVOLUTIONS, *NORMS)
"""Modules whose parameters' gradients follow from input and output gradient; each is checked before it is used."""


class Window(NamedTuple):
    """Geometry of a convolution on (B, c_in, H, W); a linear layer on S tokens is a 1 x 1 one on (B, c_in, S, 1)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def pointwise(self) -> bool:
        """Whether each output pixel sees one input pixel, the one at its own place."""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def dense(self) -> bool:
        """Whether neighbouring output pixels see neighbouring windows of all channels."""
        return self.stride == self.dilation == (1, 1) and self.groups == 1

    def side(self, size: int, axis: int) -> int:
        """Return the output's height (axis 0) or width (axis 1) for an input's."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1


def pixels(module: nn.Module, call: Call, batch: int) -> tuple[Tensor, Window] | None:
    """Return the input of a linear layer or convolution as (B, c_in, H, W) with its window; None in other layouts."""
    x = call.x
    if isinstance(module, nn.Linear):
        if x.ndim < 2 or x.shape[0] % batch or x.shape[-1] != module.in_features:
            return None
        return x.reshape(batch, -1, x.shape[-1]).transpose(1, 2).unsqueeze(3), Window()
    if x.ndim != len(module.kernel_size) + 2 or x.shape[0] != batch:
        return None
    window = Window(module.kernel_size, module.stride, (0, 0), module.dilation, module.groups)
    pads = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        x = F.pad(x, pads, mode=module.padding_mode)
    elif isinstance(module.padding, str) or math.prod(module.kernel_size) == 1:
        x = F.pad(x, pads) if any(pads) else x
    else:
        window = window._replace(padding=module.padding)
    if isinstance(module, nn.Conv1d):
        x = x.unsqueeze(2)
        fill = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
        window = window._replace(**{k: (v, getattr(window, k)[-1]) for k, v in fill.items()})
    if window.kernel == (1, 1):  # the pixels between strides do not matter
        x, window = x[:, :, :: window.stride[0], :: window.stride[1]], Window(groups=window.groups)
    return x, window


def output_gradient(module: nn.Module, d: Tensor, batch: int) -> Tensor:
    """Return the gradient of a linear layer's or convolution's output as (B, c_out, S)."""
    if isinstance(module, nn.Linear):
        return d.reshape(batch, -1, d.shape[-1]).transpose(1, 2)
    return d.reshape(batch, d.shape[1], -1)


def unfold(x: Tensor, window: Window) -> Tensor:
    """Return the window of each output pixel, (B, groups, c_in / groups * k^2, S)."""
    if window.pointwise:
        columns = x.flatten(2)
    else:
        columns = F.unfold(x, window.kernel, window.dilation, window.padding, window.stride)
    return columns.reshape(len(x), window.groups, -1, columns.shape[-1])


def weight_gradient(columns: Tensor, d: Tensor) -> Tensor:
    """Return J_i = D_i U_i^T for each of A output gradients, (B, A, c_out, q) with q = c_in / groups * k^2.

    Args:
        columns: Windows U of the layer's input (B, groups, q, S).
        d: Output gradients D (B, A, c_out, S).
    """
    (b, groups, q, s), (passes, channels) = columns.shape, d.shape[1:3]
    d = d.reshape(b, passes, groups, -1, s).transpose(1, 2).reshape(b * groups, -1, s)
    rows = torch.bmm(d, columns.reshape(b * groups, q, s).transpose(1, 2))
    return rows.reshape(b, groups, passes, -1, q).transpose(1, 2).reshape(b, passes, channels, q)


def norm_rows(
    module: nn.Module, call: Call, d: Tensor, batch: int, *, absolute: bool = False
) -> dict[str, Tensor] | None:
    """Return the gradients (B, p) of a normalisation's ``weight`` and ``bias`` in one call; None in other layouts.

    Args:
        module: The normalisation.
        call: Its call.
        d: Gradient of its output.
        batch: B.
        absolute: Sum the terms' absolute values instead.
    """
    x = call.x
    if x.shape != call.shape or x.shape[0] % batch:
        return None
    if isinstance(module, nn.LayerNorm):
        shape = tuple(module.normalized_shape)
        if tuple(x.shape[-len(shape) :]) != shape:
            return None
        unit = F.layer_norm(x, shape, None, None, module.eps)
        return {k: v.reshape(batch, -1, math.prod(shape)).sum(1) for k, v in _terms(unit, d, absolute)}
    if isinstance(module, nn.GroupNorm):
        unit = F.group_norm(x, module.num_groups, None, None, module.eps)
    elif call.statistics is None:
        return None
    else:
        unit = F.batch_norm(x, *call.statistics, None, None, False, 0.0, module.eps)
    channels = x.shape[1]
    return {
        k: v.reshape(len(x), channels, -1).sum(2).reshape(batch, -1, channels).sum(1)
        for k, v in _terms(unit, d, absolute)
    }


def _terms(unit: Tensor, d: Tensor, absolute: bool) -> list[tuple[str, Tensor]]:
    terms = [("weight", d * unit), ("bias", d)]
    return [(name, term.abs()) for name, term in terms] if absolute else terms
