"""Running a torchattacks attack on a batch so that the model and the global random state come back as they were."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.attacks.nfgsm import NFGSM
from at_extensions.attacks.pgd import PGD
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


def range_of(attack: Attack) -> tuple[float, float]:
    """Return the range that an attack clips images to: its ``image_range``, or [0, 1] for torchattacks' own."""
    return getattr(attack, "image_range", (0.0, 1.0))


def set_range(attack: Attack, limits: tuple[float, float]) -> None:
    """Let an attack clip images to another range than [0, 1].

    Raises:
        ValueError: It clips to [0, 1] whatever the images, as torchattacks' own do.
    """
    if range_of(attack) == limits:
        return
    if not hasattr(attack, "image_range"):
        raise ValueError(
            f"{attack.attack} clips images to [0, 1], but these lie in [{limits[0]:g}, {limits[1]:g}]; use attacks.PGD "
            "or attacks.NFGSM, which clip to their image_range"
        )
    attack.image_range = limits


@contextlib.contextmanager
def _searching_on(attack: Attack, twin: nn.Module | None) -> Iterator[None]:
    model = attack.model
    if twin is not None:
        attack.model = twin
    try:
        yield
    finally:
        attack.model = model


def _seeing_gradients(attack: Attack, device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which a confident network's input gradients do not underflow."""
    if isinstance(attack, (PGD, NFGSM)):
        return contextlib.nullcontext()
    lowered = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    if lowered and torch.get_autocast_dtype(device.type) is torch.float16:
        return torch.autocast(device.type, enabled=False)
    if any(p.dtype is torch.float16 for p in itertools.islice(attack.model.parameters(), 1)):
        warnings.warn(
            f"{attack.attack} searches on a float16 model, where a confident network's gradients underflow and it "
            "looks more robust than it is; use attacks.PGD or attacks.NFGSM, or attack it in float32",
            stacklevel=3,
        )
    return contextlib.nullcontext()


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

    Under float16 autocast ``attacks.PGD`` and ``attacks.NFGSM`` scale their gradients; torchattacks' own attacks, whose
    gradients would underflow, run without autocast.

    Args:
        attack: A torchattacks attack; it follows its model to another device.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) class numbers.
        loss: Loss to maximise, for attacks that take it (``attacks.PGD``, ``attacks.NFGSM``): logits (B, K) to a
            scalar or (B,).
        stream: Source of random starts; None draws from the global generators.
        batchnorm: As in ``attacking``.
        twin: Computes what the attack's model computes in eval mode (``folding.fold_batchnorm``); searched on instead.

    Returns:
        Adversarial examples (B, C, H, W), detached.
    """
    attack.set_device(images.device)  # of attacks inside this one too
    drawing = stream.on(images.device) if stream else contextlib.nullcontext()
    precise = _seeing_gradients(attack, images.device)
    with _searching_on(attack, twin), attacking(attack.model, batchnorm), drawing, precise:
        adversarial = attack.forward(images, labels) if loss is None else attack.forward(images, labels, loss)
    return adversarial.detach()
