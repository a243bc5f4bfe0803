"""Which way of computing a convolution is the fastest on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from at_extensions.folding import few_pixels, onednn, two_way, winograd, winograd_rows
from at_extensions.folding.fusing import Pending
from at_extensions.folding.layers import is_transformed

# Measured on an AMD EPYC with AVX-512 (benchmarks/convolutions.py): below, the direct convolution is as fast.
_CHANNELS, _TILES = 160, 16  # from where Winograd pays for its transforms: in and out, and tiles of a batch
_ROW_CHANNELS, _COLUMNS = 224, 32  # the same along rows, in bfloat16: a batch's pairs of columns
_FEW, _SMALL = 16, 2**22  # up to so many channels, or bytes of output, a sum is fused: beyond, memory is what counts
_DERIVED = 2**29  # numbers that a network's transformed or packed weights may be: 2 GiB in float32


def make_fast(convolutions: Sequence[nn.Conv2d]) -> list[FastConv2d]:
    """Turn a network's convolutions, in place, into those that choose their way, within a limit of memory."""
    left = _DERIVED
    for conv in convolutions:
        conv.__class__ = FastConv2d
        conv.forget()
        conv.ends_with_relu, conv.waits = None, True
        may_pack = conv.groups == 1 and conv.padding_mode == "zeros" and onednn.padding_of(conv) is not None
        transformed = 2 * winograd.INNER**2 * conv.in_channels * conv.out_channels
        packed = 2 * conv.out_channels * conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        conv.may_transform = conv.has_many_channels() and transformed <= left
        conv.may_pack = may_pack and packed <= left
        left -= transformed * conv.may_transform + packed * conv.may_pack
    return list(convolutions)


class FastConv2d(nn.Conv2d):
    """A convolution of a twin, its weights frozen.

    Instances are not made: ``make_fast`` turns a ``nn.Conv2d`` into one. On a CPU, 3 x 3 convolutions of many channels
    multiply as ``winograd`` does in float32 and float64, as ``winograd_rows`` in bfloat16; what else writes few pixels
    in bfloat16 is computed by ``few_pixels``; the others keep their weights as ``onednn`` has them. Which way is taken
    depends on shapes and dtypes alone. What is computed of the weights is kept until ``forget()``.

    Attributes:
        ends_with_relu: None, unless a sum or a ReLU is all that can come next (``fusing.fusable``); then whether a ReLU
            is the last. Such a convolution returns a ``fusing.Pending`` where that is the faster way.
        waits: False if it must return a tensor all the same.
    """

    def forward(self, x: Tensor) -> Tensor | Pending:
        """Return what ``nn.Conv2d`` would."""
        if x.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed() or not self._fits(x):
            return super().forward(x)
        if self._takes_winograd(x):
            return two_way.conv2d(x, self._derived(_transformed), self.bias)
        if self._takes_prepared(x):
            x = x.to(self.weight.dtype)
            if self._takes_rows(x):
                return two_way.conv2d(x, self._derived(_transformed_rows), self.bias)
            if self._leaves_channels_last(x):
                padding = onednn.padding_of(self)
                return few_pixels.conv2d(x, self.weight, self.bias, self.stride, padding, self._derived(_contiguous))
            if x.is_contiguous(memory_format=torch.channels_last):
                return self._packed(x)
        return super().forward(x)

    def _packed(self, x: Tensor) -> Tensor | Pending:
        packed = self._derived(onednn.Packed)
        if self.ends_with_relu is None or not self.waits or x.dtype is not torch.bfloat16:
            return packed(x)  # in float32, to compute what follows with it does not pay at any size
        shape = packed.size_of(x)
        takes_sums = self.out_channels <= _FEW or shape.numel() * x.element_size() <= _SMALL

        def fits(other: Tensor) -> bool:
            return (
                takes_sums
                and (other.shape, other.dtype) == (shape, x.dtype)
                and other.device == x.device
                and other.is_contiguous(memory_format=torch.channels_last)
            )

        return Pending(lambda other, relu: packed(x, other, relu=relu), fits, waits_for_relu=self.ends_with_relu)

    def has_many_channels(self) -> bool:
        """Whether Winograd's way can be taken, and pays where there are pixels enough."""
        return (
            (self.kernel_size, self.stride, self.dilation, self.groups) == ((3, 3), (1, 1), (1, 1), 1)
            and self.padding in ((1, 1), "same")
            and min(self.in_channels, self.out_channels) >= _CHANNELS
        )

    def forget(self) -> None:
        """Let go of what was computed of the weights, which have changed."""
        self._of_weight: dict[Callable, object] = {}

    def _derived(self, function: Callable) -> object:
        """Return a function of the convolution, computed once until its weights change."""
        known = self._of_weight  # this very one: in another thread the weights may change
        if function not in known:
            with torch.inference_mode(False), torch.no_grad():
                known[function] = function(self)
        return known[function]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_of_weight": {}}

    def _fits(self, x: Tensor) -> bool:
        """Whether these are images that can be convolved here."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or self.padding_mode != "zeros":
            return False
        return self.padding == "same" or min(self._sides(x)) > 0

    def _sides(self, x: Tensor) -> list[int]:
        """Return how many rows and columns of outputs there are."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return onednn.sides(x.shape[2:], reach, self.stride, onednn.padding_of(self))

    def _takes_winograd(self, x: Tensor) -> bool:
        """Whether there are pixels enough, digits enough, and the layout is the one that comes out."""
        tiles = len(x) * -(-x.shape[2] // winograd.TILE) * -(-x.shape[3] // winograd.TILE)
        return (
            self.may_transform
            and tiles >= _TILES
            and self.weight.is_contiguous(memory_format=torch.channels_last)
            and x.dtype == self.weight.dtype
            and (x.dtype is torch.float64 or (x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")))
        )

    def _takes_rows(self, x: Tensor) -> bool:
        """Whether there are pixels enough in bfloat16."""
        return (
            self.may_transform
            and x.dtype is torch.bfloat16
            and min(self.in_channels, self.out_channels) >= _ROW_CHANNELS
            and len(x) * -(-x.shape[3] // 2) >= _COLUMNS
        )

    def _takes_prepared(self, x: Tensor) -> bool:
        """Whether weights that oneDNN has prepared can be used; under autocast if they are in its dtype already."""
        dtype, lowered = self.weight.dtype, torch.is_autocast_enabled("cpu")
        return (
            self.may_pack
            and x.numel() > 0
            and (x.dtype == dtype or (lowered and x.dtype is torch.float32))
            and (not lowered or torch.get_autocast_dtype("cpu") == dtype)
            and self.weight.is_contiguous(memory_format=torch.channels_last)
            and onednn.is_available(dtype)
        )

    def _leaves_channels_last(self, x: Tensor) -> bool:
        if x.dtype is not torch.bfloat16 or self.dilation != (1, 1):
            return False
        height, width = self._sides(x)
        return few_pixels.leaves_channels_last(self.weight.shape, height * width)


def _transformed(conv: nn.Conv2d) -> two_way.Kernel:
    return winograd.transform(conv.weight.detach())


def _transformed_rows(conv: nn.Conv2d) -> two_way.Kernel:
    return winograd_rows.transform(conv.weight.detach())


def _contiguous(conv: nn.Conv2d) -> Tensor:
    return conv.weight.detach().contiguous()
