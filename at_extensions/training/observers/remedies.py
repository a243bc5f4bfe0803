"""Remedies against catastrophic overfitting: each changes a running training's method or attack."""

from __future__ import annotations

from collections.abc import Callable

import torchattacks

from at_extensions.attacks import NFGSM, PGD, norm_of, radius_of
from at_extensions.folding import count_steps
from at_extensions.methods import GradAlign, Method
from at_extensions.training.observers.observer import Training


def n_fgsm(trainer: Training) -> None:
    """Attack by N-FGSM with the same eps."""
    trainer.method.attack = NFGSM(trainer.method.model, radius_of(trainer.method.attack))


def grad_align(trainer: Training) -> None:
    """Put GradAlign around the method."""
    trainer.method = GradAlign(trainer.method)


def more_steps(trainer: Training) -> None:
    """Attack by PGD of twice as many steps n, at least 2, each of 1.25 eps / n."""
    attack = trainer.method.attack
    eps, steps = radius_of(attack), 2 * count_steps(attack)
    trainer.method.attack = PGD(trainer.method.model, eps, 1.25 * eps / steps, steps)


def lower_alpha(trainer: Training) -> None:
    """Halve the attack's step size; plain FGSM, which has none, becomes one step of eps / 2 from the image itself."""
    attack = trainer.method.attack
    if isinstance(attack, torchattacks.FGSM):
        trainer.method.attack = PGD(trainer.method.model, attack.eps, attack.eps / 2, 1, start="zero")
    elif hasattr(attack, "alpha"):
        attack.alpha = attack.alpha / 2
    else:
        raise ValueError(f"{attack.attack} has no step size alpha to lower; choose another remedy")


REMEDIES: dict[str, Callable[[Training], None]] = {
    "n_fgsm": n_fgsm,
    "grad_align": grad_align,
    "more_steps": more_steps,
    "lower_alpha": lower_alpha,
}
"""The remedies by name."""


def escalated(remedy: str, method: Method) -> str:
    """Return the remedy for a method that may have had it already: then ``"more_steps"``, except for a lower alpha."""
    has = {
        "n_fgsm": isinstance(method.attack, NFGSM),
        "grad_align": any(isinstance(module, GradAlign) for module in method.modules()),
    }
    return "more_steps" if has.get(remedy, False) else remedy


def check_treatable(trainer: Training, remedy: str | Callable[[Training], None]) -> None:
    """Refuse a named remedy that the method's attack does not allow.

    Raises:
        ValueError: It names the obstacle.
    """
    attack = trainer.method.attack
    if not isinstance(remedy, str):
        return
    if norm_of(attack) != "Linf" or radius_of(attack) is None:
        raise ValueError(
            f"the remedy {remedy!r} is for an attack with an eps in Linf, and {attack.attack} is none; give a remedy "
            "of your own, a function of the trainer"
        )
    if remedy == "lower_alpha" and not (isinstance(attack, torchattacks.FGSM) or hasattr(attack, "alpha")):
        raise ValueError(f"{attack.attack} has no step size alpha to lower; choose another remedy")
