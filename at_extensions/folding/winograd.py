"""3 x 3 convolutions with a quarter of the multiplications: Winograd's F(4 x 4, 3 x 3)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from at_extensions.folding import onednn
from at_extensions.folding.two_way import Kernel

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


@torch.no_grad()
def transform(weight: Tensor) -> Kernel:
    """Return the transformed weights of a convolution, (C_out, C_in, 3, 3), for ``two_way.conv2d``.

    In float32 five digits are kept, where a direct convolution keeps six.
    """
    both = weight, weight.flip(2, 3).transpose(0, 1)
    return Kernel(*(functools.partial(_convolve, _Products(of_one)) for of_one in both))


def _convolve(kernel: _Products, x: Tensor, bias: Tensor | None) -> Tensor:
    batch, _, height, width = x.shape
    to_tiles, _, from_tiles = _matrices(x.dtype, x.device)
    tiles = torch.matmul(to_tiles, _tiles(x))  # (T, 36, C_in)
    products = kernel.of(tiles, bias)
    outputs = products.shape[2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    pixels = torch.matmul(from_tiles, products).view(batch, rows, columns, TILE, TILE, outputs)
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


class _Products:
    """Multiplies each of a tile's 36 numbers' channels by a matrix of its own, of transformed weights.

    A grouped 1 x 1 convolution, for its library is the faster one on every CPU, and takes this layout as it is.
    """

    def __init__(self, weight: Tensor):
        self._outputs, self._inputs = weight.shape[:2]
        _, to_weights, _ = _matrices(weight.dtype, weight.device)
        columns = weight.permute(2, 3, 0, 1).reshape(9, self._outputs * self._inputs)
        kernel = (to_weights @ columns).view(INNER**2 * self._outputs, self._inputs, 1, 1)
        packs = weight.device.type == "cpu" and onednn.is_available(weight.dtype)
        self._kernel = onednn.Weights(kernel, (0, 0), groups=INNER**2) if packs else kernel

    def of(self, tiles: Tensor, bias: Tensor | None) -> Tensor:
        """Return (T, 36, C_out) of tiles (T, 36, C_in)."""
        if bias is not None:
            bias = F.pad(bias, (_ONES * self._outputs, (INNER**2 - _ONES - 1) * self._outputs))
        image = tiles.view(1, len(tiles), 1, INNER**2 * self._inputs).permute(0, 3, 1, 2)
        if isinstance(self._kernel, onednn.Weights):
            about = 1 << (len(tiles) - 1).bit_length()
            products = self._kernel.convolve(image, bias, size=torch.Size((*image.shape[:3], about)))
        else:
            products = F.conv2d(image, self._kernel, bias, groups=INNER**2)
        return products.permute(0, 2, 3, 1).reshape(len(tiles), INNER**2, self._outputs)


@functools.cache
def _matrices(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three transforms of both axes at once: of tiles (36, 36), weights (36, 9) and products (16, 36)."""
    square = [torch.tensor(m, dtype=torch.float64) for m in (_BT, _G, _AT)]
    return tuple(torch.kron(m, m).to(device, dtype) for m in square)
