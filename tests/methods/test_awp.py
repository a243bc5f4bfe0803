"""AWP against weights that are perturbed and restored by hand, in float64."""

import copy
import subprocess
import sys

import overfitting_worker
import pytest
import torch
from torch.nn import functional as F

from at_extensions.methods import AWP, PGDAT, REAT, TRADES


def by_hand(model, x_adv, y, gamma):
    """Loss and gradients at w + v, with the weights written to and put back."""
    net = copy.deepcopy(model)
    twin = copy.deepcopy(model)
    ascent = torch.autograd.grad(F.cross_entropy(twin(x_adv), y), list(twin.parameters()))
    with torch.no_grad():
        for p, g in zip(net.parameters(), ascent):
            if p.ndim > 1:
                p += gamma * p.norm() * g / g.norm()
    loss = F.cross_entropy(net(x_adv), y)
    return loss, torch.autograd.grad(loss, list(net.parameters())), net


def test_loss_gradient_and_buffers_equal_perturbing_by_hand(small_net, batch):
    model, (x, y) = small_net(), batch(n=6)
    model[3].p = 0.0
    method = AWP(PGDAT(model, eps=0.1, alpha=0.05, steps=2), gamma=0.02)
    x_adv = method.perturb(x, y)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    truth, gradients, moved = by_hand(model, x_adv, y, 0.02)
    step = method.loss(x, x_adv, y)
    torch.testing.assert_close(step.loss, truth, rtol=1e-12, atol=1e-12)
    step.loss.backward()
    for p, g in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
    for name, value in model.state_dict().items():
        if "running" in name or "tracked" in name:  # one training pass, at w + v
            torch.testing.assert_close(value, moved.state_dict()[name])
        else:
            assert torch.equal(value, before[name])
    assert truth > F.cross_entropy(copy.deepcopy(model)(x_adv), y)


def test_every_layer_moves_by_gamma_of_its_norm(small_net, batch):
    model, (x, y) = small_net(), batch()
    method = AWP(PGDAT(model, eps=0.1), gamma=0.01)
    objective = method._objective[0]
    weights = {n: p for n, p in objective.named_parameters() if p.ndim > 1}
    for name, move in method._ascend(objective, weights, (x, x, y, None)).items():
        assert (move.norm() / weights[name].norm()).item() == pytest.approx(0.01)


@pytest.mark.parametrize("make", [TRADES, lambda m: REAT(m, [9, 5, 2], tail_weight=0)])
def test_goes_around_other_methods(small_net, batch, make, untouched):
    model, (x, y) = small_net(), batch()
    inner = make(model)
    method = AWP(inner, gamma=0.01)
    with untouched(model, but=("buffers", "torch's random state")):
        step = method(x, y)
    step.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    if isinstance(inner, REAT):
        assert int(inner.predicted.sum()) == len(x)  # the ascent's pass does not count


def test_an_exception_in_the_loss_leaves_the_weights(small_net, batch, untouched):
    model, (x, y) = small_net(), batch()
    inner = PGDAT(model, eps=0.1, alpha=0.05, steps=1)
    method, calls, original = AWP(inner), [], inner.loss

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return original(*args)

    inner.loss = failing
    with untouched(model, but=("buffers", "torch's random state")), pytest.raises(RuntimeError, match="out of memory"):
        method(x, y)
    assert len(calls) == 2


def test_warmup_is_the_inner_method_and_the_epoch_is_remembered(small_net, batch):
    model, (x, y) = small_net(), batch()
    model[3].p = 0.0
    inner = PGDAT(model, eps=0.1, alpha=0.05, steps=1)
    method = AWP(inner, gamma=0.05, warmup=1)
    x_adv = inner.perturb(x, y)
    assert torch.equal(method.loss(x, x_adv, y).loss, inner.loss(x, x_adv, y).loss)
    method.epoch_end()
    assert not torch.equal(method.loss(x, x_adv, y).loss, inner.loss(x, x_adv, y).loss)
    other = AWP(PGDAT(small_net(), eps=0.1, alpha=0.05, steps=1), gamma=0.05, warmup=1)
    other.load_state_dict(method.state_dict())
    assert other.epoch == 2
    assert sorted(method.state_dict()) == sorted(set(method.state_dict()))


def test_a_compiled_model_gives_the_same_loss(small_net, batch):
    model, (x, y) = small_net(), batch()
    model[3].p = 0.0
    method = AWP(PGDAT(model, eps=0.1, alpha=0.05, steps=1, twin=False), gamma=0.05)
    x_adv = method.perturb(x, y)
    plain = method.loss(x, x_adv, y).loss
    method.compile(backend="eager")
    torch.testing.assert_close(method.loss(x, x_adv, y).loss, plain, rtol=1e-12, atol=1e-12)


def test_frozen_weights_are_not_perturbed(small_net, batch):
    model, (x, y) = small_net(), batch()
    model[3].p = 0.0
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)
    inner = PGDAT(model, eps=0.1, alpha=0.05, steps=1)
    x_adv = inner.perturb(x, y)
    assert torch.equal(AWP(inner, gamma=0.5).loss(x, x_adv, y).loss, inner.loss(x, x_adv, y).loss)


def test_bad_input_is_refused(small_net):
    with pytest.raises(ValueError, match="gamma must lie in"):
        AWP(PGDAT(small_net()), gamma=0.0)
    with pytest.raises(TypeError, match="inner must be a method"):
        AWP(small_net())


def test_two_processes_take_the_step_of_one_on_the_joint_batch(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, overfitting_worker.__file__, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.random.fork_rng(devices=[]):
        overfitting_worker.work(tmp_path)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    for name in ("awp", "trades", "te"):
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(two["table"], one["table"], rtol=0, atol=1e-6)
