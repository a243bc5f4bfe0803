"""Wrappings share the inner method's parts, compose losses, and keep one copy of the model in every state."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchattacks
from torch.nn import functional as F
from toys import Penalised, Shaken, Visits, a_net

from at_extensions.attacks import PGD, RandomStream, perturb
from at_extensions.methods import FGSMAT, PGDAT, REAT, Method, Standard, Step, Wrapping

WORKER = Path(__file__).with_name("wrapping_worker.py")


def a_batch(seed=0, n=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (n,), generator=generator), torch.randperm(12, generator=generator)[:n]


def pgd(net, **options):
    return PGDAT(net, eps=0.1, alpha=0.03, steps=3, **options)


def deep(net):
    return Visits(Shaken(Penalised(pgd(net))), 12)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else True for k in a)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_bare_wrapping_changes_no_bit(depth):
    results = []
    for levels in (0, depth):
        net = a_net(1)
        method = pgd(net, seed=3)
        for _ in range(levels):
            method = Wrapping(method)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for seed in range(4):
            step = method(*a_batch(seed))
            step.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((net.state_dict(), step))
    assert same(results[0][0], results[1][0])
    assert torch.equal(results[0][1].x_adv, results[1][1].x_adv)


def test_the_parts_are_the_innermost_methods():
    net = a_net()
    inner = pgd(net)
    outer = Wrapping(Wrapping(inner))
    assert outer.model is net
    assert outer.attack is inner.attack
    assert outer.stream is inner.stream
    outer.attack = PGD(net, 0.2, 0.1, 1)
    assert inner.attack.eps == 0.2
    assert [id(p) for p in outer.parameters()] == [id(p) for p in net.parameters()]
    with pytest.raises(TypeError, match="inner must be a method"):
        Wrapping(net)


@pytest.mark.parametrize("outside", [lambda m: m, Wrapping])
def test_a_penalty_reaches_the_attack_and_the_loss(outside):
    net, (x, y, index) = a_net(2), a_batch(1)
    method = outside(Penalised(pgd(net, seed=5, twin=False), weight=50.0))
    reference = copy.deepcopy(net)
    clean = reference.eval()(x).softmax(1).detach()

    def penalty(logits):
        return 50 * (logits.softmax(1) - clean).square().mean()

    attack = PGD(reference, 0.1, 0.03, 3)
    expected = perturb(attack, x, y, loss=lambda z: F.cross_entropy(z, y) + penalty(z), stream=RandomStream(5))
    step = method(x, y, index)
    assert torch.equal(step.x_adv, expected)
    assert not torch.equal(expected, perturb(attack, x, y, stream=RandomStream(5)))
    logits = reference.train()(expected)
    torch.testing.assert_close(step.loss, F.cross_entropy(logits, y) + penalty(logits))
    torch.testing.assert_close(step.terms["penalty"], penalty(logits).detach())
    assert not step.terms["penalty"].requires_grad


def test_a_penalty_adds_to_the_loss_that_the_inner_method_attacks_with():
    net, (x, y, _) = a_net(2), a_batch(1)
    reat = REAT(net, [40, 20, 10, 5], eps=0.1, alpha=0.05, steps=2, attack_weighting="logit")
    logits = torch.randn(6, 4, dtype=torch.float64)
    wrapped = Penalised(reat)
    found = wrapped.attack_loss(x, y)(logits)
    torch.testing.assert_close(found, reat.attack_loss(x, y)(logits) + wrapped.penalty(x, logits))


def test_a_loss_a_sample_is_averaged_before_a_term_is_added():
    class EachSample(Method):
        def attack_loss(self, x, y, index=None):
            return lambda logits: F.cross_entropy(logits, y, reduction="none")

    net, (x, y, _) = a_net(), a_batch()
    logits = torch.randn(6, 4, dtype=torch.float64)
    found = Wrapping(EachSample(net, PGD(net, 0.1, 0.05, 1))).inner_attack_loss(x, y)(logits)
    torch.testing.assert_close(found, F.cross_entropy(logits, y))


def test_attacks_whose_loss_cannot_be_added_to_are_refused():
    x, y, _ = a_batch()
    net = a_net()
    with pytest.raises(ValueError, match="TPGD does not take"):
        Penalised(PGDAT(net, attack=torchattacks.TPGD(net, 0.1, 0.05, 1)))(x, y)
    targeted = PGD(net, 0.1, 0.05, 1)
    targeted.set_mode_targeted_by_function(lambda x, y: (y + 1) % 4, quiet=True)
    with pytest.raises(ValueError, match="untargeted"):
        Penalised(PGDAT(net, attack=targeted))(x, y)


def test_moved_weights_give_the_gradient_there_and_come_back_bit_for_bit():
    net, (x, y, _) = a_net(3), a_batch(2)
    method = Shaken(pgd(net, seed=1), size=0.1)
    before, moved = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    step = method(x, y)
    step.loss.backward()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
    with torch.no_grad(), RandomStream(7).on(x.device):
        for p in moved.parameters():
            p += 0.1 * torch.randn_like(p)
    F.cross_entropy(moved(step.x_adv), y).backward()
    for ours, theirs in zip(net.parameters(), moved.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_clean_logits_are_computed_once_a_step_and_never_stale():
    net, (x, y, _) = a_net(4), a_batch(3)
    calls = []
    method = Penalised(Penalised(pgd(net, twin=False)))
    method.inspect(x, y)
    net.register_forward_hook(lambda *_: calls.append(net.training))
    method(x, y)
    assert calls == [False, False, False, False, True]  # once clean, three steps, one training pass
    first = method.clean_logits(x)
    with torch.no_grad():
        net[4].bias += 1
    torch.testing.assert_close(method.clean_logits(x), first + 1)
    assert net.training


def test_a_state_dict_holds_the_model_once_and_goes_on_bit_for_bit():
    method = deep(a_net(5))
    keys = method.state_dict().keys()
    model_keys = [k for k in keys if k.endswith(tuple(method.model.state_dict()))]
    assert len(model_keys) == len(method.model.state_dict())
    memory = method.memory()
    assert set(memory) == set(keys) - set(model_keys)
    assert {k for k, v in memory.items() if isinstance(v, torch.Tensor)} == {"visits", "epochs"}
    for seed in range(2):
        method(*a_batch(seed))
    method.epoch_end()
    file = io.BytesIO()
    torch.save({"model": method.model.state_dict(), "memory": method.memory()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = deep(a_net(99))
    again(*a_batch(9))
    again.model.load_state_dict(saved["model"])
    again.load_memory(saved["memory"])
    assert again.visits.sum() == 12
    for seed in range(2):
        a, b = method(*a_batch(seed)), again(*a_batch(seed))
        assert torch.equal(a.x_adv, b.x_adv)
        assert torch.equal(a.loss, b.loss)


def test_the_memory_of_another_method_is_refused_and_loads_nothing():
    method = deep(a_net())
    method(*a_batch())
    for other in (pgd(a_net()), Visits(Shaken(Penalised(pgd(a_net()))), 13), Wrapping(deep(a_net()))):
        with pytest.raises(ValueError, match="remembers other things"):
            method.load_memory(other.memory())
    assert method.visits.sum() == 6


def test_a_model_that_a_method_holds_twice_is_still_no_memory():
    net = a_net()
    method = pgd(net)
    method.head, method.again = net[4], net
    method.teacher = a_net(3)
    assert {key.split(".")[0] for key in method.memory()} == {"_extra_state", "teacher"}


def test_streams_are_found_at_every_depth():
    method = deep(a_net())
    assert method.streams() == {"inner.inner.inner.stream": method.stream, "inner.noise": method.inner.noise}
    method(*a_batch())
    method.eval()  # the running statistics stay
    state = {name: copy.deepcopy(stream.state_dict()) for name, stream in method.streams().items()}
    a = method(*a_batch(1))
    for name, stream in method.streams().items():
        stream.load_state_dict(state[name])
    assert torch.equal(method.perturb(*a_batch(1)), a.x_adv)


def test_the_index_is_asked_for_only_where_it_is_needed():
    x, y, index = a_batch()
    for method in (pgd(a_net()), Wrapping(pgd(a_net())), Penalised(pgd(a_net()))):
        assert not method.needs_index
        assert torch.isfinite(method(x, y).loss)
    for method in (deep(a_net()), Wrapping(deep(a_net()))):
        assert method.needs_index
        with pytest.raises(ValueError, match=r"needs its number: let the loader yield \(x, y, index\)"):
            method(x, y)
        with pytest.raises(ValueError, match="one whole number a sample"):
            method(x, y, index[:-1])
        assert torch.isfinite(method(x, y, index).loss)


def test_a_deep_copy_is_independent():
    method = deep(a_net(6))
    twin = copy.deepcopy(method)
    assert twin.attack.model is twin.model is not method.model
    twin(*a_batch())
    assert method.visits.sum() == 0
    assert twin.visits.sum() == 6


def test_compiled_it_makes_the_same_step(monkeypatch):
    steps = []
    for compiled in (False, True):
        torch.compiler.reset()
        method = deep(a_net(7))
        keys = list(method.state_dict())
        if compiled:
            method.compile(backend="eager")
        method(*a_batch(0)).loss.backward()
        steps.append(method(*a_batch(1)))
        assert list(method.state_dict()) == keys
        assert (method.model._compiled_call_impl is not None) == compiled
    torch.testing.assert_close(steps[0].x_adv, steps[1].x_adv, rtol=0, atol=1e-10)
    torch.testing.assert_close(steps[0].loss, steps[1].loss, rtol=0, atol=1e-10)
    assert steps[0].terms.keys() == {"penalty"}


def test_clean_training_can_be_wrapped():
    x, y, index = a_batch()
    step = Visits(Standard(a_net()), 12)(x, y, index)
    assert torch.equal(step.x_adv, x)


@pytest.mark.parametrize(
    "make", [pgd, lambda net: FGSMAT(net, eps=0.1), lambda net: PGDAT(net, attack=torchattacks.FFGSM(net, 0.1, 0.12)),
             lambda net: PGDAT(net, attack=torchattacks.FGSM(net, 0.1))],
)  # fmt: skip
def test_the_first_pass_of_an_attack_is_its_start_with_logits_and_gradient(make):
    net, (x, y, _) = a_net(8), a_batch(4)
    method = Wrapping(make(net))
    plain = copy.deepcopy(method)(x, y)
    assert method.first_pass is None
    method.keep_first_pass = True
    step = method(x, y)
    assert torch.equal(step.x_adv, plain.x_adv)
    first = method.first_pass
    start = first.images.clone().requires_grad_()
    logits = copy.deepcopy(net).eval()(start)
    # the training pass moved the running statistics, so compare with those from before it
    before = copy.deepcopy(a_net(8)).eval()(start)
    torch.testing.assert_close(first.logits, before.detach())
    assert not torch.equal(first.logits, logits)
    gradient = torch.autograd.grad(F.cross_entropy(before, y), start)[0]
    torch.testing.assert_close(first.gradient, gradient)
    assert (first.images - x).abs().max() <= 0.2 + 1e-9
    assert "get_logits" not in vars(method.attack)


def test_a_step_is_made_from_three_values_and_terms_add_up():
    logits = torch.zeros(2, 3)
    step = Step(torch.tensor(1.0), logits, logits)
    assert dict(step.terms) == {}
    more = step.plus("a", torch.tensor(2.0, requires_grad=True)).plus("b", torch.tensor(0.5))
    assert more.loss == 3.5
    assert dict(more.terms) == {"a": 2.0, "b": 0.5}
    assert dict(step.terms) == {}
    with pytest.raises(TypeError):
        step.terms["c"] = torch.tensor(1.0)


def test_two_ranks_train_the_model_together_and_merge_what_each_remembers(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(WORKER), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one["weights"], two["weights"])
    for rank in (one, two):
        assert torch.equal(rank["before"]["visits"], rank["seen"])
        assert torch.equal(rank["after"]["visits"], one["seen"] + two["seen"])
        assert rank["after"]["predicted"].sum() == 0
    assert not torch.equal(one["seen"], two["seen"])
    assert torch.equal(one["after"]["class_weights"], two["after"]["class_weights"])
    total = one["before"]["predicted"] + two["before"]["predicted"]
    assert total.sum() == 36
