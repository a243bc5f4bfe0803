"""Gram matrices of layer inputs over pairs of output positions, without single samples' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from at_extensions.analysis.ntk._layers import Window, unfold


def pixel_gram(x: Tensor, y: Tensor, window: Window) -> Tensor:
    """Return U^T U' (S, B, S, B') of the windows around each output pixel; stride 1, dilation 1, one group.

    One product of all pixels, G(s, t) = x(s) . y(t), and then sums of G shifted along both arguments,

        (U^T U')(s, t) = sum_r G(s + r, t + r),

    which are taken along one axis of the image after the other: 2 k additions instead of k^2.

    Args:
        x: Inputs (B, c_in, H, W).
        y: Other inputs (B', c_in, H, W).
        window: The convolution's geometry.
    """
    gram = _positions_first(x) @ _positions_first(y).T
    (height, width), b, c = x.shape[2:], len(x), len(y)
    gram = gram.view(height, width, b, height, width, c)
    for axis in (1, 0):
        gram = _shifted_sum(gram, axis, window.kernel[axis], window.padding[axis], window.side(x.shape[2 + axis], axis))
    return gram.reshape(gram.shape[0] * gram.shape[1], b, -1, c)


def _positions_first(x: Tensor) -> Tensor:
    return x.permute(2, 3, 0, 1).reshape(-1, x.shape[1])


def _shifted_sum(gram: Tensor, axis: int, kernel: int, padding: int, side: int) -> Tensor:
    """Sum a Gram matrix (H, W, B, H, W, B') over the offsets of a window along one axis of both images."""
    if kernel == 1 and padding == 0:
        return gram
    size = gram.shape[axis]
    shape = list(gram.shape)
    shape[axis] = shape[axis + 3] = side
    total = gram.new_zeros(shape)
    for r in range(kernel):
        start, stop = max(0, padding - r), min(side, size + padding - r)  # outputs whose offset r is in the image
        if start < stop:
            part = gram.narrow(axis, start + r - padding, stop - start)
            part = part.narrow(axis + 3, start + r - padding, stop - start)
            total.narrow(axis, start, stop - start).narrow(axis + 3, start, stop - start).add_(part)
    return total


def unfolded_gram(xs: Sequence[Tensor], ys: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
    """Return U^T U' (S, B, S, B') by unfolding inputs; any stride and dilation, one group.

    Args:
        xs: Inputs (B, c_in, H, W) of each call of the layer; their windows are joined along S in call order.
        ys: Other inputs (B', c_in, H, W) of each call.
        windows: Geometry of each call.
    """
    u, v = (
        torch.cat([unfold(z, window)[:, 0] for z, window in zip(inputs, windows)], 2).permute(2, 0, 1)
        for inputs in (xs, ys)
    )
    gram = u.reshape(-1, u.shape[2]) @ v.reshape(-1, v.shape[2]).T
    return gram.view(len(u), len(xs[0]), len(v), len(ys[0]))
