"""Which way of computing a convolution is the fastest on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from at_extensions.folding import onednn, winograd
from at_extensions.folding.fusing import Pending
from at_extensions.folding.layers import InLayout

# Measured on an AMD EPYC with AVX-512 (benchmarks/convolutions.py): below, the direct convolution is as fast.
_CHANNELS, _TILES = 160, 32  # from where Winograd pays for its transforms: in and out, and tiles of a batch
_PIXELS, _WEIGHTS = 16, 2**17  # up to so few pixels with so large weights, channels_last is slow in bf16
_FEW, _SMALL = 16, 2**22  # up to so many channels, or bytes of output, fusing pays: beyond, memory is what counts
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
        left -= transformed if conv.may_transform else packed if conv.may_pack else 0
    return list(convolutions)


class FastConv2d(nn.Conv2d):
    """A convolution of a twin, its weights frozen.

    Instances are not made: ``make_fast`` turns a ``nn.Conv2d`` into one. On a CPU, in float32 and float64, 3 x 3
    convolutions of many channels multiply as ``winograd`` does; in bfloat16, those of many channels and few pixels
    leave channels_last; the others keep their weights as ``onednn`` has them. Which way is taken depends on shapes and
    dtypes alone. What is computed of the weights is kept until ``forget()``.

    Attributes:
        ends_with_relu: None, unless a sum or a ReLU is all that can come next (``fusing.fusable``); then whether a ReLU
            is the last. Such a convolution returns a ``fusing.Pending`` where that is the faster way.
        waits: False if it must return a tensor all the same.
    """

    def forward(self, x: Tensor) -> Tensor | Pending:
        """Return what ``nn.Conv2d`` would."""
        if x.device.type != "cpu" or x.ndim != 4 or self.padding_mode != "zeros" or torch.compiler.is_compiling():
            return super().forward(x)
        if self._takes_winograd(x):
            return winograd.conv2d(x, self._derived(_transformed), self.bias)
        if self._leaves_channels_last(x):
            weight = self._derived(_contiguous)
            x = InLayout.apply(x, torch.contiguous_format)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)
        if self._packs(x):
            return self._packed(x.to(self.weight.dtype))
        return super().forward(x)

    def _packed(self, x: Tensor) -> Tensor | Pending:
        packed = self._derived(onednn.Packed)
        shape = packed.size_of(x)
        if not self._fuses(x, shape):
            return packed(x)

        def fits(other: Tensor) -> bool:
            return (
                (other.shape, other.dtype) == (shape, x.dtype)
                and other.device == x.device
                and other.is_contiguous(memory_format=torch.channels_last)
            )

        return Pending(lambda other, relu: packed(x, other, relu=relu), fits, waits_for_relu=self.ends_with_relu)

    def _fuses(self, x: Tensor, shape: torch.Size) -> bool:
        """Whether to wait for what follows; in bfloat16 alone, as in float32 fusing does not pay at any size."""
        if self.ends_with_relu is None or not self.waits or x.dtype is not torch.bfloat16:
            return False
        return self.out_channels <= _FEW or shape.numel() * x.element_size() <= _SMALL

    def has_many_channels(self) -> bool:
        """Whether Winograd's way can be taken, and pays where there are pixels enough."""
        return (
            (self.kernel_size, self.stride, self.dilation, self.groups) == ((3, 3), (1, 1), (1, 1), 1)
            and self.padding in ((1, 1), "same")
            and min(self.in_channels, self.out_channels) >= _CHANNELS
        )

    def forget(self) -> None:
        """Let go of what was computed of the weights, which have changed."""
        self._of_weight = None

    def _derived(self, function: Callable) -> object:
        """Return a function of the convolution, computed at most once until its weights change."""
        if self._of_weight is None or self._of_weight[0] is not function:
            self._of_weight = function, function(self)
        return self._of_weight[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_of_weight": None}

    def _takes_winograd(self, x: Tensor) -> bool:
        """Whether there are pixels enough, and the numbers have digits enough."""
        tiles = len(x) * -(-x.shape[2] // winograd.TILE) * -(-x.shape[3] // winograd.TILE)
        return (
            self.may_transform
            and tiles >= _TILES
            and x.dtype == self.weight.dtype
            and (x.dtype is torch.float64 or (x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")))
        )

    def _packs(self, x: Tensor) -> bool:
        """Whether oneDNN computes it, in channels_last; under autocast if the weights are in its dtype already."""
        dtype, lowered = self.weight.dtype, torch.is_autocast_enabled("cpu")
        return (
            self.may_pack
            and x.numel() > 0
            and (x.dtype == dtype or (lowered and x.dtype is torch.float32))
            and (not lowered or torch.get_autocast_dtype("cpu") == dtype)
            and x.is_contiguous(memory_format=torch.channels_last)
            and self.weight.is_contiguous(memory_format=torch.channels_last)
            and onednn.is_available(dtype)
        )

    def _leaves_channels_last(self, x: Tensor) -> bool:
        pixels = x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])
        return (
            self.weight.dtype is torch.bfloat16
            and pixels <= _PIXELS
            and self.weight.numel() // self.kernel_size[0] // self.kernel_size[1] >= _WEIGHTS
            and self.groups == 1
            and self.weight.is_contiguous(memory_format=torch.channels_last)
            and not self.weight.is_contiguous()
        )


def _transformed(conv: nn.Conv2d) -> winograd.Kernel:
    return winograd.transform(conv.weight.detach())


def _contiguous(conv: nn.Conv2d) -> Tensor:
    return conv.weight.detach().contiguous()
