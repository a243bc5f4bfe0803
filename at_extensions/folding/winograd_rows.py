"""3 x 3 convolutions in bfloat16 with two thirds of the multiplications: Winograd's F(2, 3) along rows.

Two neighbours in a row are computed at once, by four multiplications instead of six, each of them a 3 x 1 convolution
of all channels. In both directions at once more would be saved, but bfloat16 has too few digits for it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from at_extensions.folding.onednn import Weights
from at_extensions.folding.two_way import Kernel

_WIDTH = 64  # columns that oneDNN's kernel is given at least: rows of several images side by side


@torch.no_grad()
def transform(weight: Tensor) -> Kernel:
    """Return the transformed weights of a convolution, (C_out, C_in, 3, 3), in bfloat16 or float32.

    They are for ``two_way.conv2d``. In bfloat16 the relative error, 0.43 to 0.47 %, is up to twice that of a direct
    convolution (weights and results rounded), for the transformed images and the products are rounded too.
    """
    # Lavin and Gray 2016, arXiv 1509.09308, section 4.1
    left, middle, right = (column.float() for column in weight.permute(0, 2, 3, 1).unbind(2))  # (C_out, 3, C_in)
    outer, middle = (left + right) / 2, middle / 2
    kernels = [kernel.to(weight.dtype) for kernel in (left, outer + middle, outer - middle, right)]
    mirrored = [kernels[number].flip(1).transpose(0, 2).contiguous() for number in (3, 1, 2, 0)]
    four_each = ([_weights(kernel) for kernel in four] for four in (kernels, mirrored))
    return Kernel(*(functools.partial(_convolve, four) for four in four_each))


def _convolve(kernels: list[Weights], x: Tensor, bias: Tensor | None) -> Tensor:
    batch, channels, height, width = x.shape
    pairs = -(-width // 2)
    together = _together(batch, pairs)
    groups = batch // together
    padded = x.new_empty(groups, height, together, 2 * pairs + 2, channels)
    padded[:, :, :, 0] = 0
    padded[:, :, :, width + 1 :] = 0
    padded[:, :, :, 1 : width + 1] = x.permute(0, 2, 3, 1).unflatten(0, (groups, together)).transpose(1, 2)
    first, second, third, fourth = (padded[:, :, :, start : start + 2 * pairs - 1 : 2] for start in range(4))
    seen = first - third, second + third, third - second, second - fourth
    one, two, three, four = (
        _multiply(images, kernel, bias if number == 1 else None)  # the second product is in both sums
        for number, (images, kernel) in enumerate(zip(seen, kernels, strict=True))
    )
    layout = {"memory_format": torch.channels_last}
    out = torch.empty((batch, one.shape[-1], height, width), dtype=x.dtype, device=x.device, **layout)
    rows = out.permute(0, 2, 3, 1).unflatten(0, (groups, together)).transpose(1, 2)
    torch.add(one.add_(two), three, out=rows[:, :, :, 0::2])
    odd = width // 2
    torch.sub(two.sub_(three)[:, :, :, :odd], four[:, :, :, :odd], out=rows[:, :, :, 1::2])
    return out


def _together(batch: int, pairs: int) -> int:
    """Return how many images' rows are laid side by side: a divisor of the batch."""
    return next(n for n in range(1, batch + 1) if batch % n == 0 and (n * pairs >= _WIDTH or n == batch))


def _multiply(images: Tensor, kernel: Weights, bias: Tensor | None) -> Tensor:
    """Convolve the columns (G, H, N, T, C_in) of groups of N images: to (G, H, N, T, C_out)."""
    side_by_side = images.flatten(2, 3).permute(0, 3, 1, 2)
    products = kernel.convolve(side_by_side, bias)
    return products.permute(0, 2, 3, 1).unflatten(2, images.shape[2:4])


def _weights(kernel: Tensor) -> Weights:
    """Return a kernel (C_out, 3, C_in) as a convolution of columns."""
    return Weights(kernel.transpose(1, 2).unsqueeze(3), padding=(1, 0))
