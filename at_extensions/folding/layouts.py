"""Which models may be trained in channels_last: on CPUs, the gradient of some weights writes beyond its memory."""

from __future__ import annotations

import torch
from torch import nn

_VECTOR = 16  # float32 numbers in the widest vector of a CPU


def keeps_contiguous(module: nn.Module) -> bool:
    """Whether a layer must be given images, and have weights, in the usual layout while it is trained on a CPU.

    With torch 2.14.1, the weights' gradient of a convolution in float32 writes beyond its memory where all of this
    holds: a 1 x 1 kernel, a stride that divides the images' sides, no padding, no groups, more than one input channel
    but fewer than a vector has numbers (8 with AVX2), more than one image, and images or weights in channels_last. The
    forward pass and the input gradient are right. Sides, images and vectors are not known from the layer, so any stride
    and fewer than 16 input channels count here.

    Args:
        module: Any layer.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
        and module.in_channels < _VECTOR
    )


def to_channels_last(model: nn.Module) -> bool:
    """Bring a model's weights into channels_last, in place, where it can be trained in that layout.

    A model on a CPU with a layer that ``keeps_contiguous`` is left as it is, as a whole: images in channels_last are
    enough for the fault, so its images must stay in the usual layout too.

    Args:
        model: What is trained.

    Returns:
        Whether the model is in channels_last now, and its images may be.
    """
    on_cpu = any(tensor.device.type == "cpu" for tensor in model.parameters())
    if on_cpu and any(keeps_contiguous(module) for module in model.modules()):
        return False
    model.to(memory_format=torch.channels_last)
    return True
