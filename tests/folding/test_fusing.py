"""Which convolutions wait for a sum and a ReLU, and that whoever else meets them meets a tensor."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from at_extensions.folding import convolution, fold_batchnorm, onednn
from at_extensions.models import create_model

pytestmark = pytest.mark.skipif(not onednn.is_available(torch.bfloat16), reason="no oneDNN, or none in bfloat16")


class Wired(nn.Module):
    """Two convolutions with BatchNorm, and a third; ``wiring`` says what comes between them."""

    def __init__(self, wiring):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.short = nn.Conv2d(8, 8, 1)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.other = nn.Tanh()
        self.wiring = wiring

    def forward(self, x):
        x = torch.tanh(self.norm1(self.conv1(x)))
        return self.wiring(self, x).mean((2, 3))


def branch(net, x):
    return net.norm2(net.conv2(x))


def with_iadd(net, x):
    out = branch(net, x)
    out += x
    return F.relu(out)


def with_iadd_to_the_other(net, x):
    out = x * 2
    alias = out
    out += branch(net, x)
    return F.relu(out) + alias


def with_a_sum_that_broadcasts(net, x):
    one = x[:, :1]
    return F.relu(branch(net, x) + one)


def with_a_sum_of_two_dtypes(net, x):
    other = x.double()
    return F.relu(branch(net, x) + other)


def with_iadd_and_a_shortcut_in_between(net, x):
    out = branch(net, x)
    out += net.short(x)
    return net.relu_(out)


def that_multiplies_in_between(net, x):
    out = branch(net, x)
    x *= 2
    return F.relu(out) + x


def that_adds_in_place_in_between(net, x):
    x = x + 0
    out = branch(net, x)
    x += 2
    return F.relu(out) + x


def that_has_another_name_for_it(net, x):
    out = net.conv2(x)
    alias = out
    out += x
    return F.relu(out) + alias


def that_drops_the_relu(net, x):
    out = branch(net, x)
    net.relu_(out)
    return out * 2


ROUNDED = {"rtol": 2**-7, "atol": 1e-2}  # a unit in bfloat16's last place: fusing rounds once where there were two
SUM, RELU, BOTH = (True, False), (False, True), (True, True)
FUSED = [  # wiring, which convolution waits, for what; what comes of it
    (lambda net, x: F.relu(branch(net, x)), "conv2", RELU, RELU),
    (lambda net, x: torch.relu(net.conv2(x)), "conv2", RELU, RELU),
    (lambda net, x: net.relu(branch(net, x)), "conv2", RELU, RELU),
    (lambda net, x: net.relu_(branch(net, x)), "conv2", RELU, RELU),
    (lambda net, x: branch(net, x).relu_(), "conv2", RELU, RELU),
    (lambda net, x: F.relu(branch(net, x) + x), "conv2", BOTH, BOTH),
    (lambda net, x: F.relu(x + branch(net, x)), "conv2", BOTH, BOTH),
    (lambda net, x: F.relu(torch.add(x, branch(net, x))), "conv2", BOTH, BOTH),
    (lambda net, x: F.relu(branch(net, x).add(x)), "conv2", BOTH, BOTH),
    (lambda net, x: F.relu(branch(net, x).add_(x)), "conv2", BOTH, BOTH),
    (lambda net, x: branch(net, x) + x, "conv2", SUM, SUM),
    (lambda net, x: torch.tanh(x + branch(net, x)), "conv2", SUM, SUM),
    (lambda net, x: F.relu(net.short(x) + branch(net, x)), "short", BOTH, BOTH),
    (with_iadd, "conv2", BOTH, BOTH),
    (with_iadd_and_a_shortcut_in_between, "conv2", BOTH, BOTH),
    (with_iadd_to_the_other, "conv2", BOTH, None),
    (with_a_sum_that_broadcasts, "conv2", BOTH, None),
    (with_a_sum_of_two_dtypes, "conv2", BOTH, None),
]
NOT_FUSED = [
    lambda net, x: net.other(branch(net, x)),
    lambda net, x: F.relu(branch(net, x)) + branch(net, x),
    lambda net, x: F.relu(branch(net, x) * 2),
    lambda net, x: torch.add(branch(net, x), x, alpha=2),
    lambda net, x: branch(net, x) + 1,
    lambda net, x: (lambda out: F.relu(out) + out)(branch(net, x)),
    lambda net, x: (lambda out: F.relu(out + out))(branch(net, x)),
    that_has_another_name_for_it,
    that_drops_the_relu,
]


def build(wiring):
    torch.manual_seed(0)
    model = Wired(wiring).eval()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.uniform_(0.5, 2)
    return model


def images(n=4, channels=3, size=6):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fused(monkeypatch):
    """What was computed with a sum or a ReLU."""
    seen = []
    compute = onednn.Packed.compute
    assert onednn.is_available(torch.float32)  # which tries it once
    assert onednn.is_available(torch.bfloat16)

    def counting(self, x, other, relu):
        if other is not None or relu:
            seen.append((other is not None, relu))
        return compute(self, x, other, relu)

    monkeypatch.setattr(onednn.Packed, "compute", counting)
    return seen


def assert_equal(model, twin, x):
    """In float32, with and without a graph, and in bfloat16."""
    truth = copy.deepcopy(model).double()
    x = x.clone().requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(twin(x).double(), truth(x.double()), rtol=0, atol=1e-5)
    expected = torch.autograd.grad(truth(x.double()).square().sum(), x)[0]
    ours = torch.autograd.grad(twin(x).square().sum(), x)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        twin.refresh()
        low, theirs = (torch.autograd.grad(f(x).float().square().sum(), x)[0] for f in (twin, model))
    assert (low - expected).norm() < 1.2 * (theirs - expected).norm() + 0.01 * expected.norm()
    twin.refresh()


@pytest.mark.parametrize(("wiring", "waits", "waits_for", "computed"), FUSED)
def test_a_sum_and_a_relu_are_computed_with_the_convolution(wiring, waits, waits_for, computed, fused):
    model = build(wiring)
    twin = fold_batchnorm(model)
    found = {name: getattr(twin.network, name).ends_with_relu for name in ("conv1", "conv2", "short")}
    assert found == {"conv1": None, "conv2": None, "short": None} | {waits: waits_for[1]}
    x = images().requires_grad_()
    twin(x)
    with torch.no_grad():
        twin(x)
    assert not fused  # in float32 it is not the faster way
    with torch.autocast("cpu", torch.bfloat16):
        twin.refresh()(x)
        assert fused == ([] if computed is None else [computed])
        with torch.no_grad():
            twin(x)
    assert fused == ([] if computed is None else [computed] * 2)
    assert_equal(model, twin.refresh(), images())


@pytest.mark.parametrize(("wiring", "waits", "waits_for", "computed"), FUSED)
def test_in_large_outputs_a_relu_alone_is(wiring, waits, waits_for, computed, fused, monkeypatch):
    monkeypatch.setattr(convolution, "_FEW", 0)
    monkeypatch.setattr(convolution, "_SMALL", 0)
    model = build(wiring)
    twin = fold_batchnorm(model)
    with torch.autocast("cpu", torch.bfloat16):
        twin.refresh()(images())
    assert fused == ([RELU] if computed == RELU else [])
    assert_equal(model, twin.refresh(), images())


@pytest.mark.parametrize("wiring", NOT_FUSED)
def test_what_else_happens_to_a_convolution_happens_to_a_tensor(wiring, fused):
    model = build(wiring)
    twin = fold_batchnorm(model)
    assert all(getattr(twin.network, name).ends_with_relu is None for name in ("conv1", "conv2", "short"))
    assert_equal(model, twin, images())
    assert not fused


@pytest.mark.parametrize("wiring", [that_multiplies_in_between, that_adds_in_place_in_between])
def test_it_does_not_wait_while_what_it_reads_is_written(wiring):
    model = build(wiring)
    twin = fold_batchnorm(model)
    assert twin.network.conv2.ends_with_relu is None
    with torch.no_grad():
        torch.testing.assert_close(twin(images()), model(images()), rtol=0, atol=1e-5)


def test_every_block_of_a_residual_network_is_fused(fused):
    model = create_model("cifar_resnet18", 3, width=8).eval()
    twin = fold_batchnorm(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        twin.refresh()(images(size=32))
    assert sorted(fused) == [RELU] * 9 + [BOTH] * 8
    assert_equal(model, twin.refresh(), images(size=32))


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "mobilenetv3_small_050", "wide_resnet_10_2"])
def test_other_architectures_compute_what_they_did(name, fused):
    torch.manual_seed(0)
    model = create_model(name, 3).eval()
    assert_equal(model, fold_batchnorm(model), images(size=32))
    assert fused


def test_hooks_see_tensors_whenever_they_came(fused):
    model = build(with_iadd)
    seen = []
    twin = fold_batchnorm(model)

    def look(module, inputs, output):
        seen.append((module, *inputs, output))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = twin.refresh()(images())
        assert fused == [BOTH]
        for module in (model.conv2, model.norm2, model):
            handle = module.register_forward_hook(look)
            torch.testing.assert_close(twin(images()), expected, **ROUNDED)
            handle.remove()
        handle = nn.modules.module.register_module_forward_hook(look)
        try:
            torch.testing.assert_close(twin(images()), expected, **ROUNDED)
        finally:
            handle.remove()
        assert fused == [BOTH]
        assert len(seen) > 5
        assert all(isinstance(value, torch.Tensor) for _, *values in seen for value in values)
        twin(images())
        assert fused == [BOTH] * 2
        model.conv2.register_forward_hook(look)
        again = fold_batchnorm(model)
        torch.testing.assert_close(again.refresh()(images()), expected, **ROUNDED)
        assert fused == [BOTH] * 2


@pytest.mark.parametrize(
    "use",
    [
        lambda out: torch.tanh(out) * 2,
        lambda out: 2 - out,
        lambda out: out / 2 + out,
        lambda out: -out,
        lambda out: out[:, :4].clone(),
        lambda out: torch.cat([out, out]),
        lambda out: out.mul(3).relu(),
        lambda out: out.add(1),
        lambda out: out.add(torch.ones(1), alpha=2),
        lambda out: torch.relu(out) + out,
        lambda out: out.clone().add_(out),
        lambda out: out + out,
        lambda out: out.shape[1] * torch.stack(list(out)),
        lambda out: (out > 0).float(),
        lambda out: F.conv2d(out, torch.ones(1, 8, 1, 1)),
    ],
)
def test_whatever_code_the_trace_did_not_see_gets_a_tensor(use):
    """As when a model takes another way from one call to the next."""
    model = build(lambda net, x: F.relu(branch(net, x)))
    twin = fold_batchnorm(model)
    for network in (model, twin.network):
        network.wiring = lambda net, x: use(branch(net, x))
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(twin(images()), expected, rtol=0, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = twin.refresh()(images()), model(images())
    assert (ours - expected).norm() < 1.2 * (theirs - expected).norm() + 0.01 * expected.norm()


def with_a_relu_on_what_lets_no_gradient_flow(net, x):
    with torch.no_grad():
        out = branch(net, x)
    return F.relu(out) + x


def with_a_sum_on_what_lets_no_gradient_flow(net, x):
    with torch.no_grad():
        out = branch(net, x)
    return F.relu(out + net.short(x))


def with_a_sum_that_lets_none_flow(net, x):
    out = branch(net, x)
    with torch.no_grad():
        out = out + x
    return F.relu(out) + x


def with_a_relu_that_lets_none_flow(net, x):
    out = branch(net, x)
    with torch.no_grad():
        out = F.relu(out)
    return out * x


class Steep(torch.autograd.Function):
    """A ReLU with twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        """Return the ReLU."""
        ctx.save_for_backward(x)
        return F.relu(x)

    @staticmethod
    def backward(ctx, grad):
        """Return twice its gradient."""
        (x,) = ctx.saved_tensors
        return 2 * grad * (x > 0)


@pytest.mark.parametrize("function", [Steep.apply, lambda x: checkpoint(F.relu, x, use_reentrant=True)])
def test_an_autograd_function_gets_a_tensor(function):
    model = build(lambda net, x: function(branch(net, x)) + 0.1 * x)
    twin, gradients = fold_batchnorm(model), []
    for f, lowered in ((model, False), (model, True), (twin.refresh(), False), (twin, True)):
        x = images().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            twin.refresh()
            f(x).float().square().sum().backward()  # not torch.autograd.grad, which such checkpoints refuse
        gradients.append(x.grad)
    truth, plain, precise, ours = gradients
    torch.testing.assert_close(precise, truth)
    assert (ours - truth).norm() < 1.2 * (plain - truth).norm() + 0.01 * truth.norm()


@pytest.mark.parametrize(
    "wiring",
    [
        with_a_relu_on_what_lets_no_gradient_flow,
        with_a_sum_on_what_lets_no_gradient_flow,
        with_a_sum_that_lets_none_flow,
        with_a_relu_that_lets_none_flow,
    ],
)
def test_no_gradient_flows_where_the_model_lets_none_flow(wiring):
    model = build(wiring)
    assert_equal(model, fold_batchnorm(model), images())


def test_a_twin_that_waits_can_be_copied_and_pickled(fused, monkeypatch):
    twin = fold_batchnorm(create_model("cifar_resnet18", 3, width=4).eval())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = twin.refresh()(images(size=32))
        for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
            fused.clear()
            assert torch.equal(other(images(size=32)), expected)
            assert len(fused) == 17
            handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
            fused.clear()
            other(images(size=32))
            handle.remove()
            assert not fused  # what watches all modules watches those of copies too
            other.network.register_forward_hook(lambda module, inputs, output: None)
            fused.clear()
            other(images(size=32))
            assert not fused
