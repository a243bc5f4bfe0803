"""3 x 3 convolutions with a quarter of the multiplications: Winograd's F(4 x 4, 3 x 3)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TILE, INNER = 4, 6  # pixels of a side that a tile writes, and that it reads

# Lavin and Gray 2016, arXiv 1509.09308, section 4.3: Y = A^T ((G g G^T) * (B^T d B)) A
_BT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_AT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_ONES = INNER + 1  # a constant in this place of a transformed tile is the same constant in every pixel: a bias


class Weights(NamedTuple):
    """A convolution's transformed weights, a matrix for each of a tile's 36 numbers.

    Attributes:
        forward: (36, C_in, C_out).
        backward: (36, C_out, C_in), of the convolution that takes the output's gradient to the input's.
    """

    forward: Tensor
    backward: Tensor


@torch.no_grad()
def transform(weight: Tensor) -> Weights:
    """Return the transformed weights of a convolution, (C_out, C_in, 3, 3).

    In float32 five digits are kept, where a direct convolution keeps six.
    """
    _, to_weights, _ = _matrices(weight.dtype, weight.device)
    transformed = (to_weights @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(INNER**2, *weight.shape[:2])
    mirrored = (to_weights @ weight.flip(2, 3).permute(2, 3, 0, 1).reshape(9, -1)).view(INNER**2, *weight.shape[:2])
    return Weights(transformed.transpose(1, 2), mirrored)


def conv2d(x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
    """Convolve 3 x 3 pixels with stride 1 and a zero padding of 1, as ``F.conv2d(x, weight, bias, padding=1)``.

    Differentiable in ``x`` alone, as often as one likes.

    Args:
        x: (B, C_in, H, W) of the weights' dtype; channels_last is the layout that costs no copy.
        weights: What ``transform`` makes of the weights.
        bias: (C_out,) or None.

    Returns:
        (B, C_out, H, W) in channels_last.
    """
    return _Convolution.apply(x, weights, bias)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weights: Weights, bias: Tensor | None) -> Tensor:
        ctx.weights = weights
        return _convolve(x, weights.forward, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        forward, backward = ctx.weights
        return _Convolution.apply(grad, Weights(backward, forward), None), None, None


def _convolve(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    batch, _, height, width = x.shape
    to_tiles, _, from_tiles = _matrices(x.dtype, x.device)
    tiles = torch.matmul(to_tiles, _tiles(x))  # (T, 36, C_in)
    products = torch.bmm(tiles.transpose(0, 1), matrices)  # (36, T, C_out)
    if bias is not None:
        products[_ONES] += bias
    rows, columns, outputs = -(-height // TILE), -(-width // TILE), matrices.shape[2]
    pixels = torch.matmul(from_tiles, products.transpose(0, 1)).view(batch, rows, columns, TILE, TILE, outputs)
    layout = {"memory_format": torch.channels_last}
    out = torch.empty((batch, outputs, rows * TILE, columns * TILE), dtype=x.dtype, device=x.device, **layout)
    out.permute(0, 2, 3, 1).view(batch, rows, TILE, columns, TILE, outputs).copy_(pixels.transpose(2, 3))
    return out[:, :, :height, :width].contiguous(**layout) if out.shape[2:] != x.shape[2:] else out


def _tiles(x: Tensor) -> Tensor:
    """Cut images into the tiles of 6 x 6 pixels around every 4 x 4, zero outside: (T, 36, C)."""
    channels, height, width = x.shape[1:]
    padding = (0, 0, 1, 1 + -width % TILE, 1, 1 + -height % TILE)
    padded = F.pad(x.permute(0, 2, 3, 1), padding).contiguous()
    tiles = padded.unfold(1, INNER, TILE).unfold(2, INNER, TILE)  # (B, rows, columns, C, 6, 6)
    return tiles.permute(0, 1, 2, 4, 5, 3).reshape(-1, INNER**2, channels)


@functools.cache
def _matrices(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three transforms of both axes at once: of tiles (36, 36), weights (36, 9) and products (16, 36)."""
    square = [torch.tensor(m, dtype=torch.float64) for m in (_BT, _G, _AT)]
    return tuple(torch.kron(m, m).to(device, dtype) for m in square)
