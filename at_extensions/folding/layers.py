"""What the layers of a model become in its twin."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from at_extensions.folding.tracing import is_hooked


class FoldedNorm(_BatchNorm):
    """A BatchNorm that is part of the convolution before it; what timm's does after it stays."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what comes in, activated where the BatchNorm is one with its activation."""
        return _activate(self, x)


class EvalNorm(_BatchNorm):
    """A BatchNorm in eval mode whose weights need no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the BatchNorm would."""
        if x.device.type == "cpu" and not is_transformed():
            x = _EvalBatchNorm.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return _activate(self, x)


def _activate(norm: nn.Module, x: Tensor) -> Tensor:
    return norm.act(norm.drop(x)) if "act" in norm._modules else x


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


class _EvalBatchNorm(torch.autograd.Function):
    """BatchNorm in eval mode; on the CPU torch's own backward also sums over the batch for the weights' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # dx = gamma / sqrt(var + eps) grad: a BatchNorm without mean and shift
        var, weight = ctx.saved_tensors
        grad = F.batch_norm(grad, torch.zeros_like(var), var, weight, None, False, 0.0, ctx.eps)
        return grad, None, None, None, None, None


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
