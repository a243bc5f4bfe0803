"""A record of the first forward and backward pass of an attack: its start, the logits there and the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torchattacks.attack import Attack


@dataclass
class FirstPass:
    """An attack's first pass through its model; None where the attack made none that could be seen.

    Attributes:
        images: Where the attack started (B, C, H, W), its random start included.
        logits: (B, K) there.
        gradient: Gradient of the attack's loss there (B, C, H, W), up to a positive factor of each image.
    """

    images: Tensor | None = None
    logits: Tensor | None = None
    gradient: Tensor | None = None


@contextlib.contextmanager
def first_pass(attack: Attack) -> Iterator[FirstPass]:
    """Record an attack's first pass, without a pass of its own, for any attack that calls ``get_logits``.

    Single-step methods need it: GradAlign aligns this gradient with another one, and the accuracy at the start against
    the one at the end is a free sign of catastrophic overfitting. All tensors are detached copies or views.
    """
    record, get_logits = FirstPass(), attack.get_logits

    def keep(gradient: Tensor) -> None:
        if record.gradient is None:
            record.gradient = gradient.detach().clone()  # attacks take its sign in place

    def recording(inputs: Tensor, *args, **kwargs) -> Tensor:
        logits = get_logits(inputs, *args, **kwargs)
        if record.images is None:
            record.images, record.logits = inputs.detach(), logits.detach()
            if inputs.requires_grad:
                inputs.register_hook(keep)
        return logits

    vars(attack)["get_logits"] = recording
    try:
        yield record
    finally:
        del vars(attack)["get_logits"]
