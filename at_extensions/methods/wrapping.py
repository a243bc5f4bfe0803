"""A method around a method: it changes the attack's loss, the training loss, or both, and shares all the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from at_extensions.attacks import FirstPass, Loss, RandomStream
from at_extensions.methods.method import Method, Step, check_takes_loss


class Wrapping(Method):
    """A method around another one: model, attack, random starts, twin and compiled state are the inner method's.

    By itself it changes nothing. A subclass overrides some of these methods and asks ``self.inner`` for the rest:

    - ``attack_loss(x, y, index)``: the loss that the attack maximises, such as ``self.inner_attack_loss(x, y, index)``
      plus a penalty; it is handed down to the inner method's ``perturb``.
    - ``loss(x, x_adv, y, index)``: the training loss, such as ``self.inner.loss(...).plus("penalty", value)``.
    - ``epoch_end()``, which calls ``super().epoch_end()``.

    Wrappings nest. Buffers, random streams (``self.noise = RandomStream(seed)``) and local buffers of a subclass are
    part of its state, and the model's tensors appear in the state dict once.

    Args:
        inner: The method inside.

    Attributes:
        inner: The method inside.

    Raises:
        TypeError: Not a method.
    """

    def __init__(self, inner: Method):
        nn.Module.__init__(self)
        if not isinstance(inner, Method):
            raise TypeError(f"inner must be a method, such as PGDAT(model), got {type(inner).__name__}")
        self._prepare()
        self._guard.limits = inner.image_range
        self.inner = inner

    @property
    def model(self) -> nn.Module:
        """The innermost method's model."""
        return self.inner.model

    @property
    def attack(self) -> Attack | None:
        """The innermost method's attack."""
        return self.inner.attack

    @attack.setter
    def attack(self, attack: Attack | None) -> None:
        self.inner.attack = attack

    @property
    def image_range(self) -> tuple[float, float]:
        """Range of the images, the inner method's."""
        return self.inner.image_range

    @image_range.setter
    def image_range(self, limits: tuple[float, float]) -> None:
        self.inner.image_range = limits
        self._guard.limits = self.inner.image_range

    @property
    def batchnorm(self) -> str:
        """BatchNorm's mode during the attack, as in ``Method``."""
        return self.inner.batchnorm

    @property
    def stream(self) -> RandomStream:
        """The innermost method's stream of random starts."""
        return self.inner.stream

    @property
    def needs_index(self) -> bool:
        """Whether the inner method cannot do without ``index``; a subclass that cannot sets it to True."""
        return self.inner.needs_index

    @property
    def keep_first_pass(self) -> bool:
        """Whether each attack's first pass is recorded."""
        return self.inner.keep_first_pass

    @keep_first_pass.setter
    def keep_first_pass(self, keep: bool) -> None:
        self.inner.keep_first_pass = keep

    @property
    def first_pass(self) -> FirstPass | None:
        """The first pass of the last attack, where it was recorded."""
        return self.inner.first_pass

    def perturb(self, x: Tensor, y: Tensor, index: Tensor | None = None, *, loss: Loss | None = None) -> Tensor:
        """Return the inner method's adversarial examples (B, C, H, W) under ``loss``, or else ``attack_loss``."""
        loss = self.attack_loss(x, y, index) if loss is None else loss
        if loss is None:
            return self.inner.perturb(x, y, index)
        return self.inner.perturb(x, y, index, loss=loss)

    def attack_loss(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Loss | None:
        """Return the inner method's attack loss."""
        return self.inner.attack_loss(x, y, index)

    def inner_attack_loss(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Loss:
        """Return the inner method's attack loss as a scalar: the mean where it is one number a sample.

        Where the inner method leaves it to the attack it is cross-entropy.

        Raises:
            ValueError: The attack is targeted, or maximises a loss of its own.
        """
        loss = self.inner.attack_loss(x, y, index)
        if loss is not None:
            return lambda logits: torch.mean(loss(logits))
        check_takes_loss(self.attack, type(self).__name__)
        if self.attack.targeted:
            raise ValueError(f"{type(self).__name__} changes the loss of an untargeted attack; use set_mode_default()")
        return lambda logits: F.cross_entropy(logits, y)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Return the inner method's step."""
        return self.inner.loss(x, x_adv, y, index)

    def attack_on(self, x: Tensor, y: Tensor, loss: Loss | None = None) -> Tensor:
        """Run the attack from the innermost method's stream, as in ``Method``."""
        return self.inner.attack_on(x, y, loss)

    def clean_logits(self, x: Tensor) -> Tensor:
        """Return logits (B, K) in eval mode, computed once a step for all nested methods."""
        return self.inner.clean_logits(x)

    def compile(self, **options) -> None:
        """Compile the model and the twin in place, as in ``Method``."""
        self.inner.compile(**options)

    def epoch_end(self) -> None:
        """End the epoch here and in the inner method."""
        super().epoch_end()
        self.inner.epoch_end()

    def _one_step(self) -> AbstractContextManager[Iterator[None]]:
        return self.inner._one_step()
