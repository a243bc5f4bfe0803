"""GradAlign against the closed form, a slow float64 reference, and by its part in training."""

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import Penalised, a_net

from at_extensions.attacks import PGD, RandomStream
from at_extensions.methods import AWP, FGSMAT, PGDAT, TRADES, GradAlign, Standard, create_method, grad_align_weight
from at_extensions.methods.grad_align import input_gradient, misalignment

WORKER = Path(__file__).with_name("grad_align_worker.py")


class Curved(nn.Module):
    """Logits (z, 0) with z = x1 + a x1 x2, so that the cross-entropy of class 0 is softplus(-z)."""

    def __init__(self, a=1.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x):
        x1, x2 = x.flatten(1).unbind(1)
        z = x1 + self.a * x1 * x2
        return torch.stack([z, torch.zeros_like(z)], 1)


def at(*point):
    return torch.tensor(point, dtype=torch.float64).view(1, 1, 1, 2)


def a_batch(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(n) % 4


def fgsm(net, variant="plain", eps=0.1, **options):
    return FGSMAT(net, eps=eps, variant=variant, **options)


def test_value_and_derivative_equal_the_closed_form():
    model, y = Curved(), torch.zeros(1, dtype=torch.long)
    fixed = input_gradient(model, at(0, 0), y, graph=False)
    value = misalignment(fixed, input_gradient(model, at(0.5, 0), y))
    value.backward()
    assert value.item() == pytest.approx(1 - 1 / math.sqrt(1.25), abs=1e-12)
    assert model.a.grad.item() == pytest.approx(0.25 / 1.25**1.5, abs=1e-12)


def test_the_derivative_passes_gradcheck():
    y = torch.tensor([0, 1, 0])
    x = torch.rand(3, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fixed = torch.randn(3, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def of(a):
        model = Curved()
        del model._parameters["a"]
        model.a = a
        return misalignment(fixed, input_gradient(model, x, y))

    assert torch.autograd.gradcheck(of, torch.tensor(0.7, dtype=torch.float64, requires_grad=True))


def slow(net, anchor, x, y, noise, weight):
    """R image by image, in eval mode, with its gradients."""
    net = copy.deepcopy(net).eval()
    cosines = []
    for i in range(len(x)):
        gradients = []
        for point in (anchor[i : i + 1], (x + noise)[i : i + 1]):
            point = point.detach().requires_grad_(True)
            loss = F.cross_entropy(net(point), y[i : i + 1])
            gradients.append(torch.autograd.grad(loss, point, create_graph=True)[0].flatten())
        cosines.append(F.cosine_similarity(gradients[0].detach(), gradients[1], dim=0))
    value = weight * (1 - torch.stack(cosines).mean())
    return value, torch.autograd.grad(value, list(net.parameters()), allow_unused=True)


@pytest.mark.parametrize("anchor", ["start", "attack"])
@pytest.mark.parametrize("variant", ["plain", "rs", "n"])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_loss_and_gradient_equal_a_slow_reference(variant, anchor, scale):
    net = a_net(1)
    with torch.no_grad():
        net[4].weight.mul_(scale)  # confident: raw gradients are tiny
    x, y = a_batch()
    method = GradAlign(fgsm(net, variant, seed=3), weight=0.7, anchor=anchor)
    stream = copy.deepcopy(method.noise)
    before = copy.deepcopy(net)
    step = method(x, y)
    with stream.on(x.device):
        noise = torch.empty_like(x).uniform_(-0.1, 0.1)
    start = method.first_pass.images if anchor == "start" else step.x_adv
    value, gradients = slow(before, start, x, y, noise, 0.7)
    torch.testing.assert_close(step.terms["grad_align"], value.detach(), rtol=1e-9, atol=1e-12)
    step.loss.backward()
    inner = F.cross_entropy(before(step.x_adv), y)  # in train mode: one training pass
    expected = torch.autograd.grad(inner, list(before.parameters()))
    for p, g, r in zip(net.parameters(), expected, gradients):
        torch.testing.assert_close(p.grad, g if r is None else g + r, rtol=1e-8, atol=1e-11)
    for name, buffer in before.named_buffers():  # statistics of one pass, the training's
        assert torch.equal(buffer, net.get_buffer(name))


def test_the_batchs_own_statistics_equal_a_joint_reference():
    net, (x, y) = a_net(1), a_batch()
    method = GradAlign(fgsm(net, batchnorm="train"), weight=1.0)
    stream, twin = copy.deepcopy(method.noise), copy.deepcopy(net)
    step = method(x, y)
    with stream.on(x.device):
        noise = torch.empty_like(x).uniform_(-0.1, 0.1)
    twin[1].track_running_stats, gradients = False, []
    for point in (x, x + noise):
        point = point.detach().requires_grad_(True)
        gradients.append(torch.autograd.grad(F.cross_entropy(twin(point), y), point)[0].flatten(1))
    expected = 1 - F.cosine_similarity(*gradients).mean()
    torch.testing.assert_close(step.terms["grad_align"], expected, rtol=1e-9, atol=1e-12)
    step.loss.backward()


def test_the_attack_start_costs_no_pass_and_other_losses_get_their_own():
    calls = []
    for make in (
        lambda net: GradAlign(fgsm(net)),
        lambda net: GradAlign(fgsm(net), anchor="attack"),
        lambda net: GradAlign(Penalised(FGSMAT(net, eps=0.1))),
    ):
        net, (x, y) = a_net(), a_batch()
        method = make(net)
        method(x, y)
        passes = []
        net.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        method(x, y).loss.backward()
        calls.append(len(passes))
    assert calls == [
        3,
        4,
        5,
    ]  # attack, second gradient, training; a first gradient; Penalised's clean logits


def test_another_attack_loss_is_not_taken_for_cross_entropy():
    x, y = a_batch()
    values = []
    for make in (lambda net: FGSMAT(net, eps=0.1, seed=2), lambda net: Penalised(FGSMAT(net, eps=0.1, seed=2), 50.0)):
        method = GradAlign(make(a_net(2)), weight=1.0, seed=4)
        step = method(x, y)
        start = method.first_pass.images
        own = input_gradient(a_net(2), start, y, graph=False)
        with RandomStream(4).on(x.device):
            moved = input_gradient(a_net(2), torch.empty_like(x).uniform_(-0.1, 0.1) + x, y)
        values.append((step.terms["grad_align"].item(), misalignment(own, moved).item()))
    for value, expected in values:
        assert value == pytest.approx(expected, rel=1e-9)


def test_the_noise_is_not_the_attacks():
    method = GradAlign(fgsm(a_net(), "rs", seed=5), weight=1.0)
    x, y = a_batch()
    assert method(x, y).terms["grad_align"] > 1e-4  # the same noise would make it 0


def test_samples_without_gradient_leave_the_mean():
    torch.manual_seed(0)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    a[1], b[2] = 0, 0
    b.requires_grad_(True)
    value = misalignment(a, b)
    expected = (1 - F.cosine_similarity(a[[0, 3]], b[[0, 3]])).mean()
    torch.testing.assert_close(value, expected)
    value.backward()
    assert torch.isfinite(b.grad).all()
    assert not b.grad[[1, 2]].any()
    assert b.grad[[0, 3]].any()


def test_without_any_gradient_the_penalty_is_zero():
    net = a_net()
    with torch.no_grad():
        net[4].weight.zero_()
    step = GradAlign(fgsm(net))(*a_batch())
    step.loss.backward()
    assert step.terms["grad_align"] == 0
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_tiny_gradients_neither_underflow_nor_leave_the_mean():
    a = torch.tensor([[3e-30, 4e-30], [1e30, 0.0]])
    b = torch.tensor([[3e-38, 0.0], [1e-30, 0.0]])
    assert misalignment(a, b).item() == pytest.approx((0.4 + 0.0) / 2, abs=1e-6)


def test_the_weight_follows_the_rule_and_the_attacks_present_eps():
    for eps, expected in ((1, 0.0267), (4, 0.0632), (8, 0.2), (12, 0.632), (16, 2.0), (51, 2.0)):
        assert grad_align_weight(eps / 255) == pytest.approx(expected, rel=2e-3)
    method = GradAlign(fgsm(a_net(), eps=8 / 255))
    assert method.weight == pytest.approx(0.2)
    method.attack.eps = 4 / 255
    assert method.weight == pytest.approx(0.0632, rel=1e-3)
    assert GradAlign(fgsm(a_net()), weight=3).weight == 3


def test_bad_bases_and_options_are_refused():
    with pytest.warns(UserWarning, match="takes 3 steps"):
        GradAlign(PGDAT(a_net(), eps=0.1, steps=3))
    with pytest.raises(ValueError, match="got no attack"):
        GradAlign(Standard(a_net()))
    with pytest.raises(ValueError, match="anchor"):
        GradAlign(fgsm(a_net()), anchor="end")
    with pytest.raises(ValueError, match="weight"):
        GradAlign(fgsm(a_net()), weight=-1)
    with pytest.raises(TypeError, match="must be a method"):
        GradAlign(a_net())


@pytest.mark.parametrize(
    "make", [lambda m: AWP(GradAlign(m), 0.02), GradAlign, lambda m: GradAlign(m, anchor="attack")]
)
def test_the_model_is_left_as_it_was(make, untouched):
    net = a_net()
    net.train()
    method = make(FGSMAT(net, eps=0.1))
    with untouched(net, but=("buffers", "torch's random state")), warnings.catch_warnings():
        warnings.simplefilter("error")
        step = method(*a_batch())
    step.loss.backward()
    with_trades = GradAlign(TRADES(net, attack=PGD(net, 0.1, 0.1, 1)))
    with_trades(*a_batch()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_bf16_agrees_with_float32():
    net = a_net(1).float()
    x, y = a_batch(32)
    x = x.float()
    plain = GradAlign(fgsm(copy.deepcopy(net)), weight=1.0)(x, y)
    method = GradAlign(fgsm(net), weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = method(x, y)
    step.loss.backward()
    assert step.terms["grad_align"].item() == pytest.approx(plain.terms["grad_align"].item(), abs=0.05)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_model_gives_the_same_step(whole):
    results = []
    for compiled in (False, True):
        net = a_net(1)
        if whole and compiled:
            net = torch.compile(net, backend="aot_eager")
        method = GradAlign(FGSMAT(net, eps=0.1), weight=1.0)
        if compiled and not whole:
            method.compile(backend="aot_eager")
        step = method(*a_batch())
        step.loss.backward()
        results.append([step.loss.detach(), *(p.grad for p in net.parameters())])
        assert not compiled or whole or net._compiled_call_impl is not None
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_attention_is_differentiated_twice():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.out = nn.Linear(8, 8), nn.Linear(64, 4)

        def forward(self, x):
            h = self.inside(x).view(len(x), 1, 8, 8)
            return self.out(F.scaled_dot_product_attention(h, h, h).flatten(1))

    torch.manual_seed(0)
    net = Attending()
    x, y = a_batch()
    GradAlign(fgsm(net))(x.float(), y).loss.backward()
    assert torch.isfinite(net.inside.weight.grad).all()


def test_the_streams_are_part_of_the_state():
    first = GradAlign(fgsm(a_net(), "rs"), weight=1.0)
    first(*a_batch())
    second = GradAlign(fgsm(a_net(), "rs", seed=9), weight=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    a, b = first(*a_batch(seed=1)), second(*a_batch(seed=1))
    assert torch.equal(a.loss, b.loss)
    assert sorted(first.streams()) == ["inner.stream", "noise"]


def test_two_processes_train_as_one_does(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(WORKER), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in saved[0]["weights"].items():
        assert torch.equal(value, saved[1]["weights"][name])
    assert saved[0]["terms"] != saved[1]["terms"]  # each has noise of its own
    torch.testing.assert_close(saved[0]["gradient"], saved[0]["expected"], rtol=1e-9, atol=1e-12)


def test_it_is_registered():
    method = create_method("grad_align", a_net(), offered={"eps": 0.05, "seed": 3, "num_classes": 4}, anchor="attack")
    assert isinstance(method, GradAlign)
    assert method.attack.eps == 0.05
    assert method.anchor == "attack"
