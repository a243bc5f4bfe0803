"""MART against its formula computed sample by sample in float64."""

import math

import pytest
import torch

from at_extensions.methods import MART, create_method
from at_extensions.methods.mart import boosted_cross_entropy


def slow(clean, adversarial, y, beta):
    total = 0.0
    for a, b, label in zip(clean, adversarial, y.tolist()):
        p, q = a.softmax(0), b.softmax(0)
        runner_up = max(float(q[k]) for k in range(len(q)) if k != label)
        k = next(k for k in range(len(q)) if k != label and float(q[k]) == runner_up)
        boosted = -q[label].log() - (1 - q[k]).log()
        divergence = sum(p[j] * (p[j] / q[j]).log() for j in range(len(p)))
        total = total + boosted + beta * divergence * (1 - p[label])
    return total / len(y)


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_loss_and_gradient_equal_a_slow_loop(small_net, batch, beta):
    model, (x, y) = small_net(train=False), batch(n=6)
    x_adv = (x + 0.1).clamp(0, 1)
    step = MART(model, beta=beta).loss(x, x_adv, y)
    truth = slow(model(x), model(x_adv), y, beta)
    torch.testing.assert_close(step.loss, truth, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(v, list(model.parameters())) for v in (step.loss, truth))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.terms["boosted"] + step.terms["kl"], step.loss.detach())


def test_confident_mistakes_have_a_finite_loss_and_gradient():
    logits = torch.tensor([[0.0, 300.0, -5.0], [300.0, 0.0, 0.0]], requires_grad=True)
    value = boosted_cross_entropy(logits.log_softmax(1), torch.tensor([0, 0]))
    assert torch.isfinite(value).all()
    assert value[0].item() == pytest.approx(600, rel=0.01)
    assert value[1].item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(torch.autograd.grad(value.sum(), logits)[0]).all()


def test_two_classes_give_twice_the_cross_entropy():
    logits = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    value = boosted_cross_entropy(logits.log_softmax(1), torch.tensor([0]))
    assert value.item() == pytest.approx(2 * math.log(1 + math.exp(-0.5)))


def test_a_step_reads_no_value_and_leaves_the_rest(small_net, batch, untouched, no_host_sync):
    model, (x, y) = small_net(), batch()
    method = create_method("mart", model, eps=0.1, alpha=0.05, steps=2, twin=False)
    method(x, y)
    with untouched(model, but=("buffers", "torch's random state")), no_host_sync():
        method(x, y)


def test_a_negative_beta_is_refused(small_net):
    with pytest.raises(ValueError, match="beta must lie in"):
        MART(small_net(), beta=-1.0)
