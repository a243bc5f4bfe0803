"""TRADES against a slow loop in float64: loss, gradients, attack, BatchNorm statistics, two processes."""

import pytest
import torch
import torchattacks
from torch.nn import functional as F

from at_extensions.attacks import PGD
from at_extensions.methods import TRADES, create_method


def slow_kl(p_logits, q_logits):
    total = 0.0
    for a, b in zip(p_logits, q_logits):
        p, q = a.softmax(0), b.softmax(0)
        total = total + sum(p[k] * (p[k].log() - q[k].log()) for k in range(len(p)))
    return total / len(p_logits)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_loss_and_gradient_equal_a_slow_loop(small_net, batch, beta):
    model, (x, y) = small_net(train=False), batch()
    method = TRADES(model, beta=beta, eps=0.1, alpha=0.05, steps=2)
    x_adv = (x + 0.05).clamp(0, 1)
    step = method.loss(x, x_adv, y)
    clean, adversarial = model(x), model(x_adv)
    slow = F.cross_entropy(clean, y) + beta * slow_kl(clean, adversarial)
    torch.testing.assert_close(step.loss, slow, rtol=1e-12, atol=1e-12)
    ours, truth = (torch.autograd.grad(v, list(model.parameters())) for v in (step.loss, slow))
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert torch.equal(step.logits, adversarial)
    assert torch.equal(step.clean_logits, clean)
    torch.testing.assert_close(step.terms["natural"] + step.terms["kl"], step.loss.detach())


def test_the_attack_maximises_the_kl_from_fixed_clean_predictions(small_net, batch):
    model, (x, y) = small_net(), batch()
    method = TRADES(model, eps=0.1, alpha=0.04, steps=3, seed=5, twin=False)
    found = method.perturb(x, y)
    model.eval()
    state = torch.get_rng_state()
    torch.manual_seed(5)
    moved = (x + 0.001 * torch.randn_like(x)).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    torch.set_rng_state(state)
    p = model(x).detach()
    for _ in range(3):
        moved = moved.detach().requires_grad_()
        gradient = torch.autograd.grad(slow_kl(p, model(moved)), moved)[0]
        moved = (moved + 0.04 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    torch.testing.assert_close(found, moved.detach(), rtol=0, atol=1e-12)


def test_torchattacks_tpgd_finds_the_same_examples(small_net, batch):
    model, (x, y) = small_net(dtype=torch.float32), batch(dtype=torch.float32)
    options = {"eps": 0.1, "alpha": 0.03, "steps": 4}
    ours = TRADES(model, attack=PGD(model, start="gaussian", **options), twin=False, seed=1).perturb(x, y)
    theirs = TRADES(model, attack=torchattacks.TPGD(model, **options), twin=False, seed=1).perturb(x, y)
    # TPGD projects after the first step only, so its start is not clipped to the box before it
    assert ((ours - theirs).abs() > 1e-6).double().mean() < 0.02


def test_clean_and_adversarial_batches_are_normalised_apart_or_jointly(small_net, batch):
    x, y = batch(n=6)
    x_adv = (x + 0.2).clamp(0, 1)
    norms = {}
    for joint in (False, True):
        model = small_net()
        TRADES(model, joint=joint).loss(x, x_adv, y)
        norms[joint] = model[1].running_mean.clone(), int(model[1].num_batches_tracked)
    expected = small_net()
    before = expected[1].running_mean.clone()
    maps = expected[0](torch.cat([x, x_adv]))
    means = [part.mean((0, 2, 3)) for part in (maps[:6], maps[6:])]
    torch.testing.assert_close(norms[True][0], 0.9 * before + 0.1 * maps.mean((0, 2, 3)))
    torch.testing.assert_close(norms[False][0], 0.9 * (0.9 * before + 0.1 * means[0]) + 0.1 * means[1])
    assert (norms[False][1], norms[True][1]) == (2, 1)


def test_joint_equals_two_forwards_without_batch_statistics(small_net, batch):
    model, (x, y) = small_net(train=False), batch()
    x_adv = (x + 0.1).clamp(0, 1)
    a, b = (TRADES(model, joint=joint).loss(x, x_adv, y).loss for joint in (False, True))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_step_reads_no_value_and_leaves_the_rest(small_net, batch, untouched, no_host_sync):
    model, (x, y) = small_net(), batch()
    method = create_method("trades", model, eps=0.1, alpha=0.05, steps=2, twin=False)
    method(x, y)
    with untouched(model, but=("buffers", "torch's random state")), no_host_sync():
        method(x, y)


def test_bad_input_is_refused(small_net):
    model = small_net()
    with pytest.raises(ValueError, match="beta must lie in"):
        TRADES(model, beta=-1.0)
    with pytest.raises(ValueError, match="attacks with a loss of its own"):
        TRADES(model, attack=torchattacks.FGSM(model, 0.1))
    with pytest.raises(ValueError, match="has no gradient at the image itself"):
        TRADES(model, start="zero")
