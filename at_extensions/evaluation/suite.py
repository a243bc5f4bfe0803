"""AutoAttack's attacks with the settings of its versions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from at_extensions.checks import unknown_name
from at_extensions.evaluation.attacks import apgd, square
from at_extensions.evaluation.attacks.fab import FAB
from at_extensions.evaluation.attacks.restarts import RestartedPGD
from at_extensions.evaluation.flags import Flag
from at_extensions.upstream import attack_module

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "pgd-50-10": ("pgd-50-10",),
    "custom": (),
}
"""The attacks of AutoAttack's versions, in the order they run; ``pgd-50-10`` is no version of AutoAttack's."""

ATTACKS = (*VERSIONS["plus"], "pgd-50-10")
"""The names that a custom suite can be made of."""

OURS = ("pgd-50-10", "custom")
"""Versions that AutoAttack's ``set_version`` does not know."""

GRADIENT_FREE = ("square",)
CROSS_ENTROPY = ("apgd-ce", "pgd-50-10")


@dataclass(eq=False)
class Attackers:
    """AutoAttack's four attack objects, under AutoAttack's names.

    Attributes:
        apgd: Untargeted APGD, on cross-entropy or the DLR loss.
        apgd_targeted: Targeted APGD on the DLR loss.
        fab: FAB, targeted or not.
        square: Square.
    """

    apgd: Any
    apgd_targeted: Any
    fab: Any
    square: Any


def make_attackers(
    predict: Callable[[Tensor], Tensor] | None,
    norm: str,
    eps: float,
    device: torch.device | str,
    *,
    seed: int | None = 0,
    logger: Any = None,
    only_verdicts: bool = False,
) -> Attackers:
    """Return the attack objects as AutoAttack makes them, before any version's settings.

    With ``only_verdicts`` APGD discards images once they are clearly fooled; it fools the same images.
    """
    module = attack_module("autopgd_base")
    untargeted, targeted = module.APGDAttack, module.APGDAttack_targeted
    if only_verdicts:
        untargeted, targeted = apgd.attack_classes()
    shared = {"norm": norm, "eps": eps, "seed": seed, "verbose": False, "device": device}
    for_apgd = {"n_iter": 100, "eot_iter": 1, "rho": 0.75, "logger": logger, **shared}
    return Attackers(
        apgd=untargeted(predict, n_restarts=5, **for_apgd),
        apgd_targeted=targeted(predict, n_restarts=1, **for_apgd),
        fab=FAB(predict, n_restarts=5, n_iter=100, **shared),
        square=square.attack_class()(predict, p_init=0.8, n_queries=5000, n_restarts=1, resc_schedule=False, **shared),
    )


def apply_version(attackers: Any, version: str, norm: str) -> None:
    """Give the attack objects a version's settings (Croce & Hein 2020, arXiv 2003.01690; L1: arXiv 2103.01208).

    Args:
        attackers: ``Attackers``, or anything with those four attributes.
        version: ``"standard"``, ``"plus"`` or ``"rand"``.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    """
    if version == "rand":
        attackers.apgd.n_restarts, attackers.apgd.eot_iter = 1, 20
        return
    attackers.apgd_targeted.n_restarts, attackers.apgd_targeted.n_target_classes = 1, 9
    attackers.fab.n_target_classes = 9
    attackers.square.n_queries = 5000
    attackers.apgd.n_restarts = attackers.fab.n_restarts = 5
    if version == "standard":
        attackers.fab.n_restarts = 1
        if norm == "L1":
            attackers.apgd.use_largereps = attackers.apgd_targeted.use_largereps = True
            attackers.apgd_targeted.n_target_classes = 5
        else:
            attackers.apgd.n_restarts = 1


def by_name(attackers: Any, names: Iterable[str], num_classes: int) -> dict[str, Any]:
    """Return copies of the attack objects, by attack, with no more target classes than there are.

    Raises:
        ValueError: An unknown attack.
    """
    suite = {}
    for name in names:
        if name in ("apgd-ce", "apgd-dlr"):
            suite[name] = _changed(attackers.apgd, loss=name.removeprefix("apgd-"))
        elif name == "apgd-t":
            suite[name] = _changed(attackers.apgd_targeted)
        elif name == "fab":
            suite[name] = _changed(attackers.fab, targeted=False)
        elif name == "fab-t":
            suite[name] = _changed(attackers.fab, targeted=True, n_restarts=1)
        elif name == "square":
            suite[name] = _changed(attackers.square)
        elif name == "pgd-50-10":
            suite[name] = RestartedPGD(None, norm=attackers.fab.norm, eps=attackers.fab.eps)
        else:
            raise unknown_name("attack", name, ATTACKS)
        if name in ("apgd-t", "fab-t"):
            suite[name].n_target_classes = min(suite[name].n_target_classes, num_classes - 1)
    return suite


def defined_for(names: Iterable[str], num_classes: int) -> tuple[tuple[str, ...], Flag | None]:
    """Return the attacks whose loss is defined for this number of classes, and a flag if one is left out.

    The DLR loss divides by the difference of the largest and the third largest logit, its targeted form by the largest
    and the mean of the third and the fourth.
    """
    names = tuple(names)
    needs = {"apgd-dlr": 3, "apgd-t": 4}
    defined = tuple(name for name in names if num_classes >= needs.get(name, 2))
    if defined == names:
        return names, None
    out = " and ".join(name for name in names if name not in defined)
    message = f"{out} left out: its loss is undefined for {num_classes} classes, so this is not a standard evaluation"
    return defined, Flag("few_classes", message, overestimates=False)


def check_usable(suite: Mapping[str, Any], model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``model`` if the attacks can be run on it with images like ``x`` (B, C, H, W).

    Raises:
        ValueError: Logits without gradient, or images too small for Square.
    """
    if "square" in suite and suite["square"].norm != "Linf" and min(x.shape[2:]) < 5:
        raise ValueError(f"Square in {suite['square'].norm} needs images of at least 5 x 5, got {tuple(x.shape[2:])}")
    if any(name not in GRADIENT_FREE for name in suite):
        with torch.enable_grad():
            differentiable = model(x[:1].clone().requires_grad_()).requires_grad
        if not differentiable:
            raise ValueError(
                "the model's logits carry no gradient (torch.no_grad inside its forward?), which AutoAttack needs; "
                'version="custom", attacks=["square"] needs none'
            )
    return model


def aimed(attack: Any, predict: Callable[[Tensor], Tensor], *, seed: int, device: torch.device, logger: Any) -> Any:
    """Return a copy of an attack object that attacks ``predict``, with this seed, device and logger."""
    aim = "predict" if hasattr(attack, "predict") else "model"  # Square and FAB, APGD
    return _changed(attack, **{aim: predict}, seed=seed, device=device, logger=logger, verbose=False)


def settings(attack: Any) -> dict[str, Any]:
    """Return an attack's settings: the plain attributes that decide its outcome beside model, data and seed."""
    kinds = (bool, int, float, str, type(None))
    ignored = ("seed", "verbose", "device", "model", "predict", "logger", "y_target", "target_class")
    return {k: v for k, v in sorted(vars(attack).items()) if isinstance(v, kinds) and k not in ignored}


def _changed(attack: Any, **attributes: Any) -> Any:
    attack = copy.copy(attack)
    for name, value in attributes.items():
        setattr(attack, name, value)
    return attack
