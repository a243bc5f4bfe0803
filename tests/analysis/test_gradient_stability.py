"""Gradient instability against an exact example, a slow loop, and the model that it must leave alone."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from at_extensions.analysis import gradient_instability
from at_extensions.analysis.gradient_stability import ZeroGradient
from at_extensions.methods import PGDAT, REAT, TemporalEnsembling


class Exact:
    """softplus(-theta.x + eps |theta|_1): logistic loss under its exact worst case, not clipped to the box."""

    def __init__(self, model, eps):
        self.model, self.eps = model, eps

    def perturb(self, x, y, index=None):
        return x - self.eps * self.model.weight.detach().sign()

    def loss(self, x, x_adv, y, index=None):
        return F.softplus(-self.model(x_adv)).mean()


def example(eps):
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 1.0]]))
    x, y = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.long)
    direction = [torch.tensor([[-0.2, 0.0]], dtype=torch.float64)]
    return gradient_instability(model, Exact(model, eps), x, y, direction=direction, steps=[1.0], lr=1.0)


def test_the_worked_example():
    found = example(0.5)
    g0 = math.hypot(0.182932, 0.182932)
    assert found.gradient_norm == pytest.approx(g0, abs=1e-6)
    assert found.recomputed.change[0] * g0 == pytest.approx(0.437787, abs=2e-6)
    assert found.recomputed.cosine[0] == pytest.approx(0.894427, abs=1e-6)
    clean = example(0.0)
    assert clean.recomputed.change[0] * clean.gradient_norm == pytest.approx(0.055594, abs=1e-6)
    assert clean.frozen == clean.recomputed
    assert found.frozen.change[0] < found.recomputed.change[0]


@pytest.mark.parametrize("direction", ["update", "random"])
def test_equals_a_slow_loop(small_net, batch, direction):
    model, (x, y) = small_net(train=False), batch()
    method = PGDAT(model, eps=0.1, alpha=0.05, steps=3, twin=False)
    found = gradient_instability(model, method, x, y, direction=direction, steps=[0.5, 2.0], lr=0.3, seed=4)

    def gradient(net, x_adv):
        return torch.autograd.grad(F.cross_entropy(net(x_adv), y), list(net.parameters()))

    def attacked(net):
        other = PGDAT(net, eps=0.1, alpha=0.05, steps=3, twin=False, seed=4)
        return other.perturb(x, y)

    start, frozen = gradient(model, attacked(model)), attacked(model)
    if direction == "update":
        moves = [-g for g in start]
    else:
        generator = torch.Generator().manual_seed(4)
        drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
        moves = []
        for d, p in zip(drawn, model.parameters()):
            if p.ndim == 1:
                moves.append(torch.zeros_like(p))
            else:
                moves.append(torch.stack([row * (w.norm() / row.norm()) for row, w in zip(d, p.detach())]))
    for i, s in enumerate((0.5, 2.0)):
        net = small_net(train=False)
        net.load_state_dict(model.state_dict())
        with torch.no_grad():
            for p, d in zip(net.parameters(), moves):
                p += s * 0.3 * d
        for curve, x_adv in ((found.recomputed, attacked(net)), (found.frozen, frozen)):
            there = gradient(net, x_adv)
            flat, flat0 = (torch.cat([g.flatten() for g in gs]) for gs in (there, start))
            assert curve.change[i] == pytest.approx(((flat - flat0).norm() / flat0.norm()).item(), rel=1e-9)
            assert curve.cosine[i] == pytest.approx(torch.cosine_similarity(flat, flat0, dim=0).item(), rel=1e-9)


def test_everything_is_left_untouched(small_net, batch, untouched):
    model, (x, y) = small_net(), batch()
    method = REAT(model, [9, 5, 2], eps=0.1, alpha=0.05, steps=2, tail_weight=0)
    method(x, y)
    memory = {k: v.clone() for k, v in method.named_buffers()}
    stream = {k: v.clone() for k, v in method.stream.state_dict()["states"].items()}
    with untouched(model):
        first = gradient_instability(model, method, x, y, steps=[1.0])
        again = gradient_instability(model, method, x, y, steps=[1.0])
    assert first == again
    assert all(torch.equal(v, memory[k]) for k, v in method.named_buffers())
    assert all(torch.equal(v, stream[k]) for k, v in method.stream.state_dict()["states"].items())
    assert json.loads(json.dumps(first.to_dict()))["steps"] == [1.0]
    assert "frozen" in repr(first)


def test_each_point_begins_with_the_same_memory_of_the_method(small_net, batch):
    model, (x, y) = small_net(train=False), batch()
    method = TemporalEnsembling(PGDAT(model, eps=0.1, alpha=0.05, steps=1), len(x), 3, start=1, end=1)
    index = torch.arange(len(x))
    for _ in range(2):
        method(x, y, index)
    before = {key: value.clone() for key, value in method.named_buffers()}
    (alone,) = gradient_instability(model, method, x, y, steps=[2.0], index=index).recomputed.change
    last = gradient_instability(model, method, x, y, steps=[0.5, 1.0, 2.0], index=index).recomputed.change[-1]
    assert alone == last
    assert gradient_instability(model, method, x, y, steps=[0.0], index=index).recomputed.change == [0.0]
    assert all(torch.equal(value, before[key]) for key, value in method.named_buffers())


def test_weights_come_back_after_an_exception(small_net, batch, untouched):
    model, (x, y) = small_net(), batch()
    method = PGDAT(model, eps=0.1, alpha=0.05, steps=1)
    calls, original = [], method.loss

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return original(*args)

    method.loss = failing
    with untouched(model), pytest.raises(RuntimeError, match="out of memory"):
        gradient_instability(model, method, x, y, steps=[1.0])


class Constant:
    """A loss that does not depend on the weights' values."""

    def perturb(self, x, y, index=None):
        return x

    def loss(self, x, x_adv, y, index=None):
        return torch.zeros((), requires_grad=True)


def test_bad_input_is_refused(small_net, batch):
    model, (x, y) = small_net(), batch()
    method = PGDAT(model, eps=0.1)
    with pytest.raises(TypeError, match="loss must be a training method"):
        gradient_instability(model, F.cross_entropy, x, y)
    with pytest.raises(ValueError, match="another model"):
        gradient_instability(small_net(1), method, x, y)
    with pytest.raises(ValueError, match="unknown direction 'updaet'; did you mean 'update'"):
        gradient_instability(model, method, x, y, direction="updaet")
    with pytest.raises(ValueError, match="one tensor of the same shape"):
        gradient_instability(model, method, x, y, direction=[torch.zeros(3)])
    with pytest.raises(ZeroGradient, match="norm 0, so its change has no scale"):
        gradient_instability(model, Constant(), x, y)
    with pytest.raises(ValueError, match="steps is empty"):
        gradient_instability(model, method, x, y, steps=[])
