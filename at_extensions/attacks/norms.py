"""The threat model of a torchattacks attack, and the validation attack that keeps it."""

from __future__ import annotations

from collections.abc import Callable

import torchattacks
from torch import nn
from torchattacks.attack import Attack

from at_extensions.attacks.nfgsm import NFGSM
from at_extensions.attacks.pgd import PGD
from at_extensions.checks import NORMS

_LINF = (
    "PGD", "FGSM", "FFGSM", "BIM", "RFGSM", "MIFGSM", "NIFGSM", "SINIFGSM", "VMIFGSM", "VNIFGSM", "DIFGSM", "TIFGSM",
    "TPGD", "EOTPGD", "UPGD", "PGDRS", "Jitter", "SPSA",
)  # fmt: skip
_L2 = ("PGDL2", "PGDRSL2", "CW", "DeepFool")

_WAY_OUT = (
    "give Trainer one, such as val_attack=lambda model: torchattacks.PGDL2(model, eps=0.5), or val_attack=False to "
    "validate on clean images alone"
)


def _classes(names: tuple[str, ...]) -> tuple[type, ...]:
    return tuple(getattr(torchattacks, name) for name in names if hasattr(torchattacks, name))


def norm_of(attack: Attack) -> str | None:
    """Return ``"Linf"``, ``"L2"`` or ``"L1"``, the norm of an attack's perturbations; None where it is unknown.

    It is the attack's attribute ``norm`` where it has one (APGD, FAB, Square), else known from its class or the class
    that it derives from; several attacks together (MultiAttack) have the norm that all of them have.
    """
    if attack._attacks and isinstance(attack, torchattacks.MultiAttack):
        norms = {norm_of(inside) for inside in attack.attacks}
        return norms.pop() if len(norms) == 1 else None
    norm = getattr(attack, "norm", None)
    if norm in NORMS:
        return norm
    if isinstance(attack, _classes(_L2)):
        return "L2"
    if isinstance(attack, (NFGSM, *_classes(_LINF))):
        return "Linf"
    return None


def radius_of(attack: Attack) -> float | None:
    """Return an attack's ``eps``; None for attacks without one, such as DeepFool and CW.

    Several attacks together have the largest of theirs.
    """
    if attack._attacks and isinstance(attack, torchattacks.MultiAttack):
        radii = [radius_of(inside) for inside in attack.attacks]
        return None if None in radii else max(radii)
    return getattr(attack, "eps", None)


def validation_attack(attack: Attack) -> Callable[[nn.Module], Attack]:
    """Return a maker of the ten-step attack in the norm and with the radius of a training attack.

    Linf: ``attacks.PGD`` in the attack's range of images; L2: torchattacks' PGDL2, both with steps of eps / 4.

    Raises:
        ValueError: The norm or the radius is unknown, or it is L1, in which torchattacks has no attack that works.
    """
    norm, eps = norm_of(attack), radius_of(attack)
    if norm is None or eps is None:
        unknown = "norm" if norm is None else "radius"
        raise ValueError(
            f"the {unknown} of the training attack {attack.attack} is unknown, so no validation attack follows from "
            f"it; {_WAY_OUT}"
        )
    if norm == "Linf":
        limits = getattr(attack, "image_range", (0.0, 1.0))
        return lambda model: PGD(model, eps=eps, alpha=eps / 4, steps=10, image_range=limits)
    if norm == "L2":
        return lambda model: torchattacks.PGDL2(model, eps=eps, alpha=eps / 4, steps=10)
    raise ValueError(f"torchattacks has no attack in {norm} that could validate; {_WAY_OUT}")
