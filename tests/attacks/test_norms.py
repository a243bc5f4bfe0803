"""The norm of an attack, and a validation attack that keeps norm and radius."""

import pytest
import torch
import torchattacks

from at_extensions.attacks import (
    NFGSM,
    PGD,
    ClassEpsPGD,
    RandomStream,
    norm_of,
    perturb,
    radius_of,
    validation_attack,
)

KNOWN = {
    "PGD": ("Linf", 0.1, lambda net: PGD(net, 0.1)),
    "NFGSM": ("Linf", 0.1, lambda net: NFGSM(net, 0.1)),
    "ClassEpsPGD": ("Linf", 0.1, lambda net: ClassEpsPGD(net, [1.0, 1.2, 0.8], 0.1)),
    "torchattacks FGSM": ("Linf", 0.1, lambda net: torchattacks.FGSM(net, 0.1)),
    "torchattacks TPGD": ("Linf", 0.1, lambda net: torchattacks.TPGD(net, 0.1)),
    "PGDL2": ("L2", 0.5, lambda net: torchattacks.PGDL2(net, 0.5)),
    "APGD L2": ("L2", 0.5, lambda net: torchattacks.APGD(net, norm="L2", eps=0.5)),
    "APGD Linf": ("Linf", 0.1, lambda net: torchattacks.APGD(net, eps=0.1)),
    "FAB L2": ("L2", 0.5, lambda net: torchattacks.FAB(net, norm="L2", eps=0.5)),
    "Square L2": ("L2", 0.5, lambda net: torchattacks.Square(net, norm="L2", eps=0.5)),
    "MultiAttack": (
        "L2", 0.7, lambda net: torchattacks.MultiAttack([torchattacks.PGDL2(net, 0.5), torchattacks.PGDL2(net, 0.7)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_the_validation_attack_moves_images_by_the_radius_in_the_norm(linear_net, batch, name):
    norm, eps, make = KNOWN[name]
    net, (x, y) = linear_net(num_classes=3).float(), batch(dtype=torch.float32)
    training = make(net)
    assert (norm_of(training), radius_of(training)) == (norm, eps)
    attack = validation_attack(training)(net)
    y = net(x).argmax(1)
    moved = (perturb(attack, x, y, stream=RandomStream(0)) - x).flatten(1)
    size = moved.norm(p={"Linf": float("inf"), "L2": 2}[norm], dim=1)
    assert (size <= eps * 1.001).all()
    assert size.max() > 0.9 * eps


class Own(torchattacks.attack.Attack):
    """An attack of a user's own, whose norm nothing tells."""

    def __init__(self, model, eps):
        super().__init__("Own", model)
        self.eps = eps


class Derived(torchattacks.PGDL2):
    """An attack that derives from a known one."""


@pytest.mark.parametrize(
    ("make", "unknown"),
    [
        (lambda net: Own(net, 0.1), "norm"),
        (lambda net: torchattacks.OnePixel(net), "norm"),
        (lambda net: torchattacks.DeepFool(net), "radius"),
        (lambda net: torchattacks.CW(net), "radius"),
        (lambda net: torchattacks.FAB(net, norm="L1", eps=3.0), "L1"),
        (lambda net: torchattacks.MultiAttack([PGD(net, 0.1), torchattacks.PGDL2(net, 0.5)]), "norm"),
    ],
)
def test_an_unknown_norm_or_radius_is_refused_with_the_way_out(linear_net, make, unknown):
    with pytest.raises(ValueError, match=rf"{unknown}.*val_attack="):
        validation_attack(make(linear_net()))


def test_a_derived_attack_has_the_norm_of_its_kind(linear_net):
    net = linear_net()
    assert norm_of(Derived(net, eps=0.3)) == "L2"
    assert validation_attack(Derived(net, eps=0.3))(net).eps == 0.3
