"""Convolutions of few pixels against torch's own, and a training pass that is routed through them."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from at_extensions.folding import few_pixels, onednn, training_pass

needs_bf16 = pytest.mark.skipif(not onednn.is_available(torch.bfloat16), reason="no oneDNN, or none in bfloat16")
GEOMETRIES = [  # channels in, out, kernel, stride, padding, height, width
    (384, 352, 3, 1, 1, 4, 4),  # leaves channels_last
    (256, 512, 3, 2, 1, 8, 8),
    (384, 384, 3, 1, 0, 5, 6),
    (384, 352, (3, 1), 1, (1, 0), 4, 4),
    (128, 256, 3, 2, 1, 16, 16),  # whose weights' gradient alone is computed otherwise
    (512, 256, 1, 1, 0, 4, 4),
    (512, 256, 1, (2, 1), 0, 8, 4),
    (128, 256, 5, 3, 2, 9, 7),
]
CASES = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def make(geometry, dtype=torch.float64, bias=True, batch=3):
    inputs, outputs, kernel, stride, padding, height, width = geometry
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=bias)
    x = torch.randn(batch, inputs, height, width)
    return (part.to(dtype, memory_format=torch.channels_last) for part in (conv, x))


def derivatives(convolve, conv, x):
    """Return the convolution, its gradients of everything, and those of the gradients' square sums."""
    x = x.clone().requires_grad_()
    wanted = [x, *conv.parameters()]
    y = convolve(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, wanted, cotangent, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (*wanted[:2], cotangent))
    plain = torch.autograd.grad(convolve(x), wanted, cotangent.detach())
    return [y, *first, *second, *plain]


@CASES
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_convolution_with_all_its_derivatives(geometry, bias):
    conv, x = make(geometry, bias=bias)
    ours = lambda x: few_pixels.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)  # noqa: E731
    for a, t in zip(derivatives(ours, conv, x), derivatives(conv, conv, x)):
        assert a.shape == t.shape
        torch.testing.assert_close(a, t, rtol=1e-10, atol=1e-9)


@CASES
def test_with_frozen_weights_only_the_images_get_a_gradient(geometry):
    conv, x = make(geometry)
    conv.requires_grad_(False)
    x.requires_grad_()
    contiguous = conv.weight.contiguous()
    y = few_pixels.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, contiguous)
    torch.testing.assert_close(y, conv(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    for a, t in zip(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(conv(x).square().sum(), x)):
        torch.testing.assert_close(a, t)
        assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def routed(monkeypatch):
    """The shapes of the weights that were routed."""
    seen = []
    conv2d = few_pixels.conv2d

    def counting(x, weight, *args):
        seen.append(tuple(weight.shape))
        return conv2d(x, weight, *args)

    monkeypatch.setattr(few_pixels, "conv2d", counting)
    return seen


def step(model, x, *, faster):
    """Return the loss and the gradients of one training pass under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        if faster:
            with training_pass(model):
                out = model(x)
        else:
            out = model(x)
    loss = out.float().square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


class Net(nn.Module):
    """Every kind of convolution, the last ones of few pixels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.down = nn.Conv2d(64, 512, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(512, 128, 3, stride=2, padding=1, groups=2)
        self.last = nn.Conv2d(128, 1024, 3, padding=1)
        self.same = nn.Conv2d(1024, 64, 3, padding="same")
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.grouped(F.relu(self.down(x))))
        return self.head(self.same(F.relu(self.last(x))).mean((2, 3)))


def make_net():
    torch.manual_seed(0)
    net = Net().to(memory_format=torch.channels_last)
    return net, torch.rand(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)


@needs_bf16
def test_a_training_pass_has_the_gradients_it_had(routed):
    net, x = make_net()
    plain = copy.deepcopy(net)
    truth = copy.deepcopy(net).double()
    ours, theirs = step(net, x, faster=True), step(plain, x, faster=False)
    assert routed == [(512, 64, 3, 3), (1024, 128, 3, 3)]
    loss = truth(x.double()).square().mean()
    exact = [loss, *torch.autograd.grad(loss, list(truth.parameters()))]
    for (name, parameter), a, b, t in zip([("loss", x), *net.named_parameters()], ours, theirs, exact):
        assert a.dtype == b.dtype, name
        assert (a - t).norm() < 1.2 * (b - t).norm() + 1e-3 * t.norm(), name
        if a.ndim == 4:
            assert a.stride() == parameter.stride(), name
    for ours_, theirs_ in zip(net.buffers(), plain.buffers()):
        torch.testing.assert_close(ours_, theirs_)
    assert all(type(module) is type(other) for module, other in zip(net.modules(), plain.modules()))


@needs_bf16
def test_what_is_frozen_gets_no_gradient(routed):
    net, x = make_net()
    net.down.requires_grad_(False)
    net.last.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), training_pass(net):
        net(x).float().sum().backward()
    assert routed == [(1024, 128, 3, 3)]  # the weights' gradient was all that was to be gained with the other one
    assert net.last.weight.grad is None
    assert net.stem.weight.grad is not None


@needs_bf16
@pytest.mark.parametrize(
    "change",
    [
        lambda net, x: (net.double(), x.double()),
        lambda net, x: (net.to(memory_format=torch.contiguous_format), x),
        lambda net, x: (net, x[:0]),
        lambda net, x: (net, torch.nn.functional.pad(x, (0, 48, 0, 48)).contiguous(memory_format=torch.channels_last)),
    ],
    ids=["float64", "weights", "empty", "pixels"],
)
def test_what_is_no_faster_is_left_to_torch(change, routed):
    net, x = change(*make_net())
    reference = copy.deepcopy(net)
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(x)
        with training_pass(net):
            out = net(x)
    assert torch.equal(out, expected)
    assert not routed


def test_without_autocast_or_large_weights_nothing_is_routed(routed):
    net, x = make_net()
    with training_pass(net):
        net(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(training_pass(nn.Conv2d(128, 128, 3, stride=2)), contextlib.nullcontext)
    with torch.autocast("cpu", torch.float16), training_pass(net):
        pass
    assert not routed


@needs_bf16
def test_checkpointing_and_transforms_get_torchs_own(routed):
    net, x = make_net()
    with torch.autocast("cpu", torch.bfloat16), training_pass(net):
        checkpoint(net, x, use_reentrant=False).float().sum().backward()
        assert not routed
        net.eval()  # transforms refuse to write running statistics
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        torch.func.grad(lambda p: torch.func.functional_call(net, p, x).float().sum())(parameters)
        assert not routed
        x = torch.rand(2, 128, 4, 4).contiguous(memory_format=torch.channels_last)
        with forward_ad.dual_level():
            out = net.last(forward_ad.make_dual(x, torch.ones_like(x)))
            assert forward_ad.unpack_dual(out).tangent is not None
        assert not routed
        net.last(x)
        assert routed
    assert net.down.weight.grad is not None


@needs_bf16
@pytest.mark.parametrize("settings", [{"enabled": False}, {"dtype": torch.float16}])
def test_where_a_model_sets_autocast_itself_torchs_own_way_is_taken(settings, routed):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(512, 512, 3, padding=1)

        def forward(self, x):
            with torch.autocast("cpu", **settings):
                return self.conv(x)

    net = Careful().to(memory_format=torch.channels_last)
    x = torch.randn(2, 512, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(x)
        with training_pass(net):
            assert torch.equal(net(x), expected)
    assert expected.dtype is settings.get("dtype", torch.float32)
    assert not routed


@needs_bf16
def test_calls_with_keywords_are_routed_too(routed):
    net = nn.Conv2d(512, 64, 3).to(memory_format=torch.channels_last)
    weight = net.weight
    x = torch.randn(2, 512, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.conv2d(x, weight, stride=2, padding=1)
        with training_pass(net):
            torch.testing.assert_close(F.conv2d(x, weight=weight, stride=2, padding=1), expected)
            with pytest.raises(RuntimeError, match="channels"):
                F.conv2d(x[:, :256].contiguous(memory_format=torch.channels_last), weight)
            with pytest.raises(RuntimeError, match="size"):
                F.conv2d(x[:, :, :1, :1], weight)
    assert routed == [(64, 512, 3, 3)]
