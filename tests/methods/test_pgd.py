"""PGD-AT on any of torchattacks' attacks."""

import pytest
import torch
import torchattacks
from torch.nn import functional as F

from at_extensions.attacks import RandomStream, perturb
from at_extensions.methods import PGDAT

ATTACKS = {
    "PGD": lambda net: torchattacks.PGD(net, eps=0.1, alpha=0.03, steps=3),
    "PGDL2": lambda net: torchattacks.PGDL2(net, eps=0.5, alpha=0.2, steps=3),
    "FGSM": lambda net: torchattacks.FGSM(net, eps=0.1),
    "FFGSM": lambda net: torchattacks.FFGSM(net, eps=0.1, alpha=0.12),
    "TPGD": lambda net: torchattacks.TPGD(net, eps=0.1, alpha=0.03, steps=3),
    "MIFGSM": lambda net: torchattacks.MIFGSM(net, eps=0.1, alpha=0.03, steps=3),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_torchattacks_attacks_train(small_net, batch, name):
    net, (images, labels) = small_net(1), batch(2)
    expected = perturb(ATTACKS[name](net), images, labels, stream=RandomStream(3))
    step = PGDAT(net, attack=ATTACKS[name](net), twin=False, seed=3)(images, labels)
    assert torch.equal(step.x_adv, expected)
    assert (expected - images).abs().max() > 0.01
    step.loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_its_own_attack_is_torchattacks_pgd_from_the_same_stream(small_net, batch):
    net, (images, labels) = small_net(4), batch(5)
    ours = PGDAT(net, eps=0.1, alpha=0.03, steps=4, seed=6)
    theirs = PGDAT(net, attack=torchattacks.PGD(net, eps=0.1, alpha=0.03, steps=4), seed=6)
    for _ in range(2):
        a, b = ours.perturb(images, labels), theirs.perturb(images, labels)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_a_targeted_attack_pulls_toward_its_targets(small_net, batch):
    net, (images, labels) = small_net(7, train=False), batch(8)
    attack = torchattacks.PGD(net, eps=0.2, alpha=0.05, steps=5)
    attack.set_mode_targeted_by_function(lambda x, y: (y + 1) % 3, quiet=True)
    adversarial = PGDAT(net, attack=attack).perturb(images, labels)
    assert F.cross_entropy(net(adversarial), (labels + 1) % 3) < F.cross_entropy(net(images), (labels + 1) % 3)


def test_training_lowers_the_adversarial_loss_and_the_seed_decides_every_bit(small_net, batch):
    def train(seed):
        net, (images, labels) = small_net(9), batch(10, 16)
        net[3].p = 0.0
        method = PGDAT(net, eps=0.05, alpha=0.02, steps=3, seed=seed)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
        losses = []
        for _ in range(15):
            step = method(images, labels)
            step.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(step.loss.item())
        return losses, net.state_dict()

    losses, weights = train(0)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, train(0)[1][key]) for key, value in weights.items())
    assert not all(torch.equal(value, train(1)[1][key]) for key, value in weights.items())


@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero"])
def test_the_start_is_handed_on(small_net, start):
    assert PGDAT(small_net(), start=start).attack.start == start
