"""The layers of a twin that replace a model's, and questions about layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from at_extensions.folding.tracing import is_hooked


class FoldedNorm(_BatchNorm):
    """A BatchNorm that is part of the convolution before it; what timm's does after it stays."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what comes in, activated where the BatchNorm is one with its activation."""
        return self.act(self.drop(x)) if "act" in self._modules else x


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know torch's own operators alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def does_nothing(module: nn.Module | None) -> bool:
    """Whether a layer hands on the very tensor that it gets."""
    if module is None or is_hooked(module) or "forward" in vars(module):
        return False
    if type(module) is FoldedNorm:
        return "act" not in module._modules
    return type(module) is nn.Identity or (type(module) is nn.Sequential and not len(module))


def padding_of(conv: nn.Conv2d) -> list[int] | None:
    """Return the zeros at each side, (rows, columns), where they are as many at both ends: None otherwise."""
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding != "same":
        return list(conv.padding)
    wide = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(w % 2 for w in wide) else [w // 2 for w in wide]


class InLayout(torch.autograd.Function):
    """The same tensor in another layout, and its gradient in the one that the tensor had: attacks may ``view`` it."""

    @staticmethod
    def forward(ctx, x: Tensor, layout: torch.memory_format) -> Tensor:
        """Return the tensor in ``layout``."""
        ctx.layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return x.contiguous(memory_format=layout)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Return the gradient in the tensor's own layout."""
        return grad.contiguous(memory_format=ctx.layout), None
