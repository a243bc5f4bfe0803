"""Training on clean images: the baseline that adversarial training is compared with."""

from __future__ import annotations

from torch import nn

from at_extensions.methods.method import Method
from at_extensions.methods.registry import register


@register("standard", "clean training: cross-entropy on the images as they are")
class Standard(Method):
    """Standard training: cross-entropy on clean images, no attack.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K).
        twin: As in ``Method``, so that every method takes it; there is no attack that would search on a twin.
        seed: Of the stream of random starts, which clean training does not draw from.
    """

    def __init__(self, model: nn.Module, *, twin: bool | str = "auto", seed: int = 0):
        super().__init__(model, twin=twin, seed=seed)
