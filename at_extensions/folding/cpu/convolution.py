"""Which of a twin's convolutions are computed by Winograd's algorithm, and on which images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from at_extensions.folding.cpu import winograd
from at_extensions.folding.layers import is_transformed
from at_extensions.folding.tracing import is_exactly

# From how many channels (in and out) and tiles of a batch Winograd's algorithm pays for its transforms, on CPUs with
# AVX2 and with AVX-512 (benchmarks/convolutions.py); with fewer, the direct convolution is as fast
_CHANNELS, _TILES = 160, 32
_TRANSFORMED = 2**29  # numbers that a network's transformed weights may be: 2 GiB in float32


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution of a twin, its weights frozen, that takes Winograd's algorithm where that is the faster way.

    Instances are not made: ``accelerate`` turns a ``nn.Conv2d`` into one. Shapes, dtypes and layout alone
    decide, so results are reproducible. Under autocast, on other devices, in transforms of ``torch.func`` and while
    torch compiles, it is a ``nn.Conv2d``. The transformed weights are kept until ``forget()``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return what ``nn.Conv2d`` would, (B, C_out, H, W); in float32 with five digits instead of six."""
        if not self._takes_winograd(x):
            return super().forward(x)
        weights = self._transformed
        if weights is None:
            with torch.inference_mode(False):
                weights = self._transformed = winograd.transform(self.weight)
        return winograd.conv2d(x, weights, self.bias)

    def forget(self) -> None:
        """Discard the transformed weights: the weights have changed."""
        self._transformed: winograd.Weights | None = None

    def _takes_winograd(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and x.ndim == 4
            and x.shape[1] == self.in_channels
            and len(x) * -(-x.shape[2] // winograd.TILE) * -(-x.shape[3] // winograd.TILE) >= _TILES
            and self.weight.is_contiguous(memory_format=torch.channels_last)  # so is what comes out
            and not (x.dtype is torch.float32 and torch.is_autocast_enabled("cpu"))
            and not torch.compiler.is_compiling()
            and not is_transformed()
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_transformed": None}


CONVOLUTIONS: tuple[type[nn.Conv2d], ...] = (WinogradConv2d,)
"""The types that convolutions become, each with ``nn.Conv2d``'s attributes."""


def accelerate(network: nn.Module) -> list[WinogradConv2d]:
    """Let convolutions of a twin's network take faster ways, in place.

    Args:
        network: The twin's copy of a model, its weights frozen.

    Returns:
        Those that do; call ``forget()`` on each when its weights have changed.
    """
    found, left = [], _TRANSFORMED
    for conv in network.modules():
        if is_exactly(conv, (nn.Conv2d,)) and _has_the_shape(conv):
            numbers = 2 * winograd.INNER**2 * conv.in_channels * conv.out_channels
            if numbers <= left:
                left -= numbers
                conv.__class__ = WinogradConv2d
                conv.forget()
                found.append(conv)
    return found


def _has_the_shape(conv: nn.Conv2d) -> bool:
    return (
        (conv.kernel_size, conv.stride, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and conv.padding in ((1, 1), "same")
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= _CHANNELS
    )
