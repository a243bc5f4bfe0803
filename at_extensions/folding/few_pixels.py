"""Convolutions in bfloat16 that write few pixels of each image: on a CPU, torch's usual ways are slow there.

In channels_last, oneDNN's kernels compute the pixels of a row side by side, so that short rows leave them half empty;
and its gradients of the weights split their sums over the pixels. The usual layout and a matrix multiplication are the
faster ways, with the same numbers up to the order of sums.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from at_extensions.folding import onednn
from at_extensions.folding.layers import is_transformed

# Measured on an AMD EPYC with AVX-512 (benchmarks/convolutions.py): from how many pairs of channels, up to how many
# pixels of the output, the faster ways are faster
_PAIRS, _PIXELS = 2**17, 16
_STRIDED_PAIRS, _STRIDED_PIXELS = 2**15, 64  # where a larger kernel has a stride: the weights' gradient alone


def leaves_channels_last(shape: torch.Size, pixels: int) -> bool:
    """Whether the usual layout is the faster one: weights of a shape, outputs of so many pixels an image."""
    outputs, inputs, *kernel = shape
    return pixels <= _PIXELS and inputs * outputs >= _PAIRS and max(kernel) > 1


def multiplies(shape: torch.Size, stride: tuple[int, int], pixels: int) -> bool:
    """Whether the weights' gradient is better computed by a matrix multiplication."""
    outputs, inputs, *kernel = shape
    pairs = inputs * outputs
    if max(kernel) > 1 and max(stride) > 1 and pixels <= _STRIDED_PIXELS and pairs >= _STRIDED_PAIRS:
        return True
    return pixels <= _PIXELS and pairs >= _PAIRS


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    contiguous: Tensor | None = None,
) -> Tensor:
    """Convolve without dilation and groups, as ``F.conv2d``; differentiable as often as one likes.

    Args:
        x: (B, C_in, H, W) in channels_last.
        weight: (C_out, C_in, kH, kW) of the same dtype, in channels_last.
        bias: (C_out,) or None.
        stride: Of both sides.
        padding: Zeros at each side.
        contiguous: The weights in the usual layout, where somebody keeps them.

    Returns:
        (B, C_out, H', W') in the layout of ``x``.
    """
    return _Convolution.apply(x, weight, bias, stride, padding, contiguous)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple, contiguous):
        height, width = onednn.sides(x.shape[2:], weight.shape[2:], stride, padding)
        ctx.leaves = leaves_channels_last(weight.shape, height * width)
        ctx.layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, contiguous)
        if ctx.leaves:
            x, weight = x.contiguous(), weight.contiguous() if contiguous is None else contiguous
        return F.conv2d(x, weight, bias, stride, padding).contiguous(memory_format=ctx.layout)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, contiguous = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            geometry = ctx.stride, ctx.padding
            of_x = nn.grad.conv2d_input(ctx.shape, weight, grad, *geometry) if wants_x else None
            of_weight = nn.grad.conv2d_weight(x, weight.shape, grad, *geometry) if wants_weight else None
        else:
            of_x = _input_gradient(ctx, grad, weight, contiguous) if wants_x else None
            of_weight = _weight_gradient(grad, x, weight.shape, ctx.stride, ctx.padding) if wants_weight else None
        return of_x, of_weight, grad.sum((0, 2, 3)) if wants_bias else None, None, None, None


def _input_gradient(ctx, grad: Tensor, weight: Tensor, contiguous: Tensor | None) -> Tensor:
    layout = torch.channels_last
    if ctx.leaves and max(ctx.stride) == 1:  # with a stride, it writes more pixels than the convolution
        layout, weight = torch.contiguous_format, weight.contiguous() if contiguous is None else contiguous
    grad = grad.contiguous(memory_format=layout)
    of_x = onednn.input_gradient(grad, weight, ctx.shape, ctx.stride, ctx.padding)
    return of_x.contiguous(memory_format=ctx.layout)


def _weight_gradient(grad: Tensor, x: Tensor, shape: torch.Size, stride: tuple, padding: tuple) -> Tensor:
    """Multiply the outputs' gradients by the inputs that each of them was computed of; in channels_last."""
    outputs, inputs, *kernel = shape
    pixels = x.permute(0, 2, 3, 1)
    if any(padding):
        pixels = F.pad(pixels, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    seen = pixels.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # (B, H', W', C_in, kH, kW)
    columns = seen.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel[0] * kernel[1] * inputs)
    rows = grad.permute(0, 2, 3, 1).reshape(-1, outputs)
    return torch.mm(rows.t(), columns).view(outputs, *kernel, inputs).permute(0, 3, 1, 2)


def training_pass(model: nn.Module) -> contextlib.AbstractContextManager:
    """Let a model's training pass, in bfloat16 on a CPU, compute such convolutions in the faster ways.

    Inside, ``F.conv2d`` (and so ``nn.Conv2d``) is routed for images in channels_last; the model is not touched, and its
    backward pass may come later. Everything else, other devices and dtypes too, is left to torch. All of it is where
    autocast is not on for a CPU in bfloat16, and where no weights of the model are large enough.

    Args:
        model: What is called inside.
    """
    if not _lowers() or torch.compiler.is_compiling() or not onednn.is_available(torch.bfloat16):
        return contextlib.nullcontext()
    large = any(p.ndim == 4 and p.shape[0] * p.shape[1] >= _STRIDED_PAIRS for p in model.parameters())
    return _Routing() if large else contextlib.nullcontext()


class _Routing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            call = _Call(*args, **(kwargs or {}))
            if call.is_routed():
                return call.run()
        return function(*args, **(kwargs or {}))


class _Call:
    """A call of ``F.conv2d``, with its arguments."""

    def __init__(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        self.x, self.weight, self.bias, self.groups = input, weight, bias, groups
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def is_routed(self) -> bool:
        """Whether the faster ways can be taken, and are any."""
        x, weight = self.x, self.weight
        if not (type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and x.ndim == weight.ndim == 4):
            return False
        if x.device.type != "cpu" or weight.device.type != "cpu" or x.numel() == 0 or self.groups != 1:
            return False
        if isinstance(self.padding, str) or not _lowers() or _is_watched():
            return False
        self.stride, self.padding, dilation = (_both(n) for n in (self.stride, self.padding, self.dilation))
        dtypes = (torch.float32, torch.bfloat16)  # what autocast lowers
        fits = dilation == (1, 1) and x.shape[1] == weight.shape[1] and x.dtype in dtypes and weight.dtype in dtypes
        if not fits or not all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)):
            return False
        height, width = onednn.sides(x.shape[2:], weight.shape[2:], self.stride, self.padding)
        if min(height, width) < 1:
            return False
        pixels = height * width
        return leaves_channels_last(weight.shape, pixels) or (
            weight.requires_grad and multiplies(weight.shape, self.stride, pixels)
        )

    def run(self) -> Tensor:
        """Compute it as autocast would, in its dtype."""
        dtype = torch.bfloat16
        bias = None if self.bias is None else self.bias.to(dtype)
        return conv2d(self.x.to(dtype), self.weight.to(dtype), bias, self.stride, self.padding)


def _lowers() -> bool:
    """Whether autocast is on for a CPU in bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def _is_watched() -> bool:
    """Whether somebody counts on the operators themselves: transforms of torch.func, or checkpointing."""
    return is_transformed() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _both(side: int | tuple[int, ...]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[-1])
