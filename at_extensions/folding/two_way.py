"""A convolution whose input's gradient is computed as it is itself: by another of its kind, of transformed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Kernel(NamedTuple):
    """A convolution's transformed weights, as functions of images and a bias (or None).

    Attributes:
        forward: Of C_in channels to C_out.
        backward: Of the convolution that takes the output's gradient to the input's.
    """

    forward: Callable[[Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor | None], Tensor]


def conv2d(x: Tensor, kernel: Kernel, bias: Tensor | None = None) -> Tensor:
    """Convolve 3 x 3 pixels with stride 1 and a zero padding of 1, as ``F.conv2d(x, weight, bias, padding=1)``.

    Differentiable in ``x`` alone, as often as one likes.

    Args:
        x: (B, C_in, H, W) of the weights' dtype; channels_last is the layout that costs no copy.
        kernel: What ``winograd.transform`` or ``winograd_rows.transform`` makes of the weights.
        bias: (C_out,) or None.

    Returns:
        (B, C_out, H, W) in channels_last.
    """
    return _Convolution.apply(x, kernel, bias)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: Kernel, bias: Tensor | None) -> Tensor:
        ctx.kernel = kernel
        return kernel.forward(x, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        forward, backward = ctx.kernel
        return _Convolution.apply(grad, Kernel(backward, forward), None), None, None
