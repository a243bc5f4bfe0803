"""Kernels of a CPU for a twin's layers: 3 x 3 convolutions of many channels by Winograd's algorithm.

``folding.backends`` asks for ``accelerate`` and ``CONVOLUTIONS``; without this folder twins compute the same in torch's
own ways.
"""

from at_extensions.folding.cpu.convolution import CONVOLUTIONS, accelerate

__all__ = ["CONVOLUTIONS", "accelerate"]
