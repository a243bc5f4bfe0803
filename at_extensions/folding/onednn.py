"""Convolutions by oneDNN with weights in its own layout, and with what follows them done while they write."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FEW_CHANNELS = 4  # up to so many, the gradient of four pixels at once fills a vector of sixteen numbers

_LOCK = threading.Lock()  # held while weights are laid out anew
_LAYOUTS = 4  # of one convolution's weights that are kept: a network sees few sizes of images
_TWICE = {torch.bfloat16: torch.float32, torch.float32: torch.float64}  # dtypes of twice the bytes


def is_available(dtype: torch.dtype) -> bool:
    """Whether torch was built with these operators for this CPU, it has the dtype, and they compute what they should.

    On CPUs with AVX2 or AVX-512 alone: nobody has measured others.
    """
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled() and _works(dtype)


class Weights:
    """A convolution's weights in oneDNN's own layouts.

    There is one for each size of images: with another one's, oneDNN brings them into the right one in every call, in up
    to a hundred times the time of the convolution. Sizes that want the same layout share it.

    Args:
        weight: (C_out, C_in / groups, kH, kW), float32 or bfloat16; not to be changed before the first image came.
        padding: Zeros at each side.
        stride: Of both sides.
        dilation: Of both sides.
        groups: Of channels.
    """

    def __init__(
        self,
        weight: Tensor,
        padding: Sequence[int],
        stride: Sequence[int] = (1, 1),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ):
        self._weight = weight
        self._geometry = list(padding), list(stride), list(dilation), groups
        self._of_size: dict[torch.Size, Tensor] = {}
        self._of_layout: dict[bytes, Tensor] = {}

    def convolve(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        other: Tensor | None = None,
        *,
        relu: bool = False,
        size: torch.Size | None = None,
    ) -> Tensor:
        """Return the convolution of images in channels_last, plus ``other``, activated; without a graph.

        ``size`` is that of images whose layout is good enough, where it takes long to make another.
        """
        packed = self._for(size or x.shape)
        if other is None:
            after = "relu" if relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *self._geometry, after, [], "")
        after = "relu" if relu else None
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, packed, bias, *self._geometry, "add", 1.0, after, [], ""
        )

    def _for(self, size: torch.Size) -> Tensor:
        packed = self._of_size.get(size)
        if packed is None:
            with _LOCK, torch.inference_mode(False):
                packed = self._of_size[size] = self._laid_out(size)
        return packed

    def _laid_out(self, size: torch.Size) -> Tensor:
        weight = next(iter(self._of_layout.values())).to_dense() if self._weight is None else self._weight
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry, list(size))
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
        if layout not in self._of_layout and len(self._of_layout) >= _LAYOUTS:
            self._of_layout, self._of_size = {}, {}
        packed = self._of_layout.setdefault(layout, packed)
        self._weight = None  # one copy is enough
        return packed


class Packed:
    """A convolution whose weights oneDNN has brought into its own layout, once instead of in every call.

    Computes what ``nn.Conv2d`` does for images in channels_last, with one difference: in bfloat16, a sum and a ReLU
    that are part of it are taken before the rounding.

    Args:
        conv: No groups, zero padding; its weights in channels_last, of float32 or bfloat16.
    """

    def __init__(self, conv: nn.Conv2d):
        self.weight, self.bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.padding = padding_of(conv)
        self._forward = Weights(self.weight, self.padding, self.stride, self.dilation)
        self._gradient: dict[type, _Kernel] = {}

    def __call__(self, x: Tensor, other: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """Return the convolution of ``x``, plus ``other``, activated; differentiable in both, as often as one likes.

        Args:
            x: (B, C_in, H, W) in channels_last.
            other: To be added: of the output's shape, in channels_last.
            relu: Whether a ReLU comes last.
        """
        if torch.is_grad_enabled() and (x.requires_grad or (other is not None and other.requires_grad)):
            return _Convolution.apply(x, other, self, relu)
        return self.compute(x, other, relu)

    def size_of(self, x: Tensor) -> torch.Size:
        """Return the output's shape."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        return torch.Size((len(x), len(self.weight), *sides(x.shape[2:], reach, self.stride, self.padding)))

    def compute(self, x: Tensor, other: Tensor | None, relu: bool) -> Tensor:
        """Return the output, without a graph."""
        return self._forward.convolve(x, self.bias, other, relu=relu)

    def kernel_for(self, shape: torch.Size) -> _Kernel | None:
        """Return what turns the output's gradient into that of images of a shape; None where torch's own is as fast."""
        one_pixel = max(self.weight.shape[2:]) == 1
        if max(self.stride) > 1:
            way = _Spread if one_pixel and max(self.padding) == 0 else None
        elif min(self.flipped_padding()) < 0:
            way = None
        elif one_pixel or max(self.dilation) > 1 or shape[1] > _FEW_CHANNELS or any(side % 2 for side in shape[2:]):
            way = _Flipped
        else:
            way = _InBlocks
        if way is not None and way not in self._gradient:
            self._gradient[way] = way(self)
        return self._gradient.get(way)

    def flipped_padding(self) -> list[int]:
        """Return the padding of the convolution that takes the output's gradient to the input's."""
        return [d * (k - 1) - p for p, d, k in zip(self.padding, self.dilation, self.weight.shape[2:], strict=True)]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor | None, packed: Packed, relu: bool) -> Tensor:
        out = packed.compute(x, other, relu)
        ctx.packed, ctx.shape = packed, x.shape
        if ctx.needs_input_grad[0]:  # now: by the time of the gradient, the weights may be others
            ctx.kernel = packed.kernel_for(x.shape)
        ctx.save_for_backward(out if relu else None, packed.weight)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        of_x = None
        if ctx.needs_input_grad[0]:
            packed, kernel = ctx.packed, ctx.kernel
            geometry = packed.stride, packed.padding, packed.dilation
            if torch.is_grad_enabled():  # a gradient of the gradient is asked for
                of_x = nn.grad.conv2d_input(ctx.shape, weight, grad, *geometry)
            elif kernel is None:
                of_x = input_gradient(grad, weight, ctx.shape, *geometry)
            else:
                of_x = kernel(grad, ctx.shape)
        return of_x, grad if ctx.needs_input_grad[1] else None, None, None


class _Flipped:
    """Stride 1: the gradient is a convolution with the flipped weights, and computed as one."""

    def __init__(self, packed: Packed):
        weight = packed.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        self._weights = Weights(weight, packed.flipped_padding(), dilation=packed.dilation)

    def __call__(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return self._weights.convolve(grad)


class _InBlocks:
    """Stride 1 and few channels in, as images have: 2 x 2 pixels are computed as four times the channels of one.

    A convolution of stride 2 whose weights are those of the four pixels, each shifted to its place.
    """

    def __init__(self, packed: Packed):
        flipped = packed.weight.flip(2, 3).transpose(0, 1)
        shifted = [F.pad(flipped, (column, 1 - column, row, 1 - row)) for row in (0, 1) for column in (0, 1)]
        weight = torch.cat(shifted).contiguous(memory_format=torch.channels_last)
        self._weights = Weights(weight, packed.flipped_padding(), stride=(2, 2))

    def __call__(self, grad: Tensor, shape: torch.Size) -> Tensor:
        blocks = self._weights.convolve(grad)
        batch, channels, height, width = shape
        rows = blocks.permute(0, 2, 3, 1).view(batch, height // 2, width // 2, 2, 2 * channels)
        pixels = rows.view(_TWICE[grad.dtype]).transpose(2, 3).contiguous().view(grad.dtype)  # two numbers at a time
        return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)


class _Spread:
    """A strided 1 x 1 convolution: the pixels that it read get a gradient, the others none."""

    def __init__(self, packed: Packed):
        self._stride = packed.stride
        weight = packed.weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        self._weights = Weights(weight, (0, 0))

    def __call__(self, grad: Tensor, shape: torch.Size) -> Tensor:
        read = self._weights.convolve(grad)
        spread = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last).zero_()
        spread[:, :, :: self._stride[0], :: self._stride[1]] = read
        return spread


_Kernel = _Flipped | _InBlocks | _Spread


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    shape: torch.Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """Return ``nn.grad.conv2d_input`` without its copy of images that are not looked at; no graph.

    Args:
        grad: The output's gradient (B, C_out, H', W'), in channels_last or the usual layout; so is what is returned.
        weight: (C_out, C_in, kH, kW) in the same layout.
        shape: Of the images.
        stride: Of both sides.
        padding: Zeros at each side.
        dilation: Of both sides.
    """
    is_last = grad.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    images = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    wanted = [True, False, False]
    backward = torch.ops.aten.convolution_backward
    return backward(grad, images, weight, None, stride, padding, dilation, False, [0, 0], 1, wanted)[0]


def sides(inputs: Sequence[int], reach: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Return how many rows and columns of outputs there are, each of which depends on so many of the inputs."""
    return [(n + 2 * p - r) // s + 1 for n, r, s, p in zip(inputs, reach, stride, padding, strict=True)]


def padding_of(conv: nn.Conv2d) -> list[int] | None:
    """Return the zeros at each side, where they are as many at both: None otherwise."""
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding != "same":
        return list(conv.padding)
    wide = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(w % 2 for w in wide) else [w // 2 for w in wide]


@functools.cache
@torch.no_grad()
def _works(dtype: torch.dtype) -> bool:
    """Try every operator; they are torch's own, but not of its public interface."""
    if dtype not in (torch.float32, torch.bfloat16) or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return False
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    conv = nn.utils.skip_init(nn.Conv2d, 4, 8, 3, padding=1)
    for parameter in conv.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    conv = conv.to(dtype, memory_format=torch.channels_last)
    x, other = (torch.randn(2, c, 6, 6, generator=generator).to(dtype) for c in (4, 8))
    x, other = (t.contiguous(memory_format=torch.channels_last) for t in (x, other))
    truth = F.relu(F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1) + other.double())
    try:
        out = Packed(conv).compute(x, other, relu=True)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return torch.allclose(out.double(), truth, atol=1e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2)
