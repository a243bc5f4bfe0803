"""Attacks in half precision find what they find in float32, however confident the network is."""

import pytest
import torch
import torchattacks
from torch import nn
from torch.nn import functional as F

from at_extensions.attacks import NFGSM, PGD, ClassEpsPGD, RandomStream, perturb
from at_extensions.methods import PGDAT


def a_confident_net(scale=150.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        net[3].weight *= scale
    return net


def a_batch(net, n=64):
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, net(x).argmax(1)


ATTACKS = {
    "PGD": lambda net: PGD(net, 0.15, 0.04, 10),
    "NFGSM": lambda net: NFGSM(net, 0.15),
    "ClassEpsPGD": lambda net: ClassEpsPGD(net, [1.0, 0.5, 1.0, 1.2], 0.15, 0.04, 5),
    "torchattacks PGD": lambda net: torchattacks.PGD(net, 0.15, 0.04, 10),
    "torchattacks PGDL2": lambda net: torchattacks.PGDL2(net, 1.0, 0.3, 10),
}


def accuracies(make, net, x, y, dtype):
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            adversarial = perturb(make(net), x, y, stream=RandomStream(2))
        with torch.no_grad():
            found.append((net(adversarial.float()).argmax(1) == y).float().mean().item())
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_under_autocast_is_as_strong_as_without(name, dtype):
    if name.startswith("torchattacks") and dtype is torch.bfloat16:
        pytest.skip("bfloat16 has float32's range, and torchattacks' own attacks run in it as they are")
    net = a_confident_net()
    x, y = a_batch(net)
    precise, half = accuracies(ATTACKS[name], net, x, y, dtype)
    assert precise < 0.9
    assert abs(precise - half) < 0.05


def test_unscaled_gradients_in_float16_would_miss_confident_images():
    net = a_confident_net()
    x, y = a_batch(net)
    with torch.autocast("cpu", torch.float16):
        inputs = x.clone().requires_grad_()
        plain = torch.autograd.grad(F.cross_entropy(net(inputs), y), inputs)[0]
    assert (plain.flatten(1).abs().amax(1) == 0).float().mean() > 0.3


def test_a_method_under_float16_autocast_searches_as_in_float32():
    net = a_confident_net().train()
    x, y = a_batch(net)
    steps = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            steps.append(PGDAT(net, eps=0.15, alpha=0.04, steps=5)(x, y).x_adv)
    assert (steps[0] - steps[1]).abs().gt(1e-3).float().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_statistics_get_one_factor_for_the_batch(dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
        )
    x, y = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            attack = PGD(net, 0.1, 0.1, 1)
            results.append(perturb(attack, x, y, stream=RandomStream(2), batchnorm="train"))
    # the sign is that of the sum over images; a factor for each image would change it
    assert (results[0] - results[1]).abs().gt(1e-3).float().mean() < 0.06


def test_a_float16_model_under_anothers_attack_is_warned_of():
    net = a_confident_net().half()
    x, y = a_batch(a_confident_net())
    with pytest.warns(UserWarning, match="searches on a float16 model"):
        perturb(torchattacks.PGD(net, 0.1, 0.05, 1), x.half(), y)


def test_in_float32_nothing_changes():
    net = a_confident_net(1.0)
    x, y = a_batch(net)
    ours = perturb(PGD(net, 0.1, 0.03, 3), x, y, stream=RandomStream(3))
    theirs = perturb(torchattacks.PGD(net, 0.1, 0.03, 3), x, y, stream=RandomStream(3))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
