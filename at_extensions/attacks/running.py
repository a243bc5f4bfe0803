"""Running a torchattacks attack on a batch so that the model and the global random state come back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.untouched import RandomStream, attacking


def check_attack(attack: Attack, model: nn.Module | None = None) -> Attack:
    """Return ``attack`` if it is a torchattacks attack on ``model`` that sees images in [0, 1].

    Raises:
        TypeError: Not a ``torchattacks.attack.Attack``.
        ValueError: Made for another model, or told to normalise.
    """
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be a torchattacks.attack.Attack, got {type(attack).__name__}")
    if attack.normalization_used is not None:
        raise ValueError(
            f"{attack.attack} was given set_normalization_used; normalisation belongs inside the model: "
            "create_model(..., mean=, std=)"
        )
    if model is not None and attack.model is not model:
        raise ValueError(f"{attack.attack} attacks another model than the one that is trained; make it with that one")
    return attack


@contextlib.contextmanager
def _searching_on(attack: Attack, twin: nn.Module | None) -> Iterator[None]:
    model = attack.model
    if twin is not None:
        attack.model = twin
    try:
        yield
    finally:
        attack.model = model


def perturb(
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    *,
    loss: Callable[[Tensor], Tensor] | None = None,
    stream: RandomStream | None = None,
    batchnorm: str = "eval",
    twin: nn.Module | None = None,
) -> Tensor:
    """Run an attack on a batch and leave nothing behind.

    Args:
        attack: A torchattacks attack; it follows its model to another device.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) class numbers.
        loss: What to maximise, for attacks that take it (``attacks.PGD``, ``attacks.NFGSM``): logits (B, K) to a
            scalar or (B,).
        stream: Where random starts come from; None draws from the global generators.
        batchnorm: As in ``attacking``.
        twin: Computes what the attack's model computes in eval mode (``folding.fold_batchnorm``); searched on instead.

    Returns:
        Adversarial examples (B, C, H, W), detached.
    """
    attack.set_device(images.device)  # of attacks inside this one too
    drawing = stream.on(images.device) if stream else contextlib.nullcontext()
    with _searching_on(attack, twin), attacking(attack.model, batchnorm), drawing:
        adversarial = attack.forward(images, labels) if loss is None else attack.forward(images, labels, loss)
    return adversarial.detach()
