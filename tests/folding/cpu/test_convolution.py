"""A twin's convolutions: which are computed by Winograd's algorithm, and that they agree with the model."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from at_extensions.folding import fold_batchnorm
from at_extensions.folding.cpu import convolution, winograd
from at_extensions.folding.cpu.convolution import WinogradConv2d


class Net(nn.Module):
    """Convolutions with BatchNorm, a residual one among them, for many channels."""

    def __init__(self, width=160, stride=1):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding="same")
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.first_norm(self.first(x)))
        y = self.second(x)
        y += x  # as RobustBench's blocks do
        return self.head(F.relu(y).mean((2, 3)))


@pytest.fixture
def taken(monkeypatch):
    """How often Winograd's algorithm was taken."""
    seen = {"winograd": 0}

    def counting(*args):
        seen["winograd"] += 1
        return convolve(*args)

    convolve = winograd.conv2d
    monkeypatch.setattr(winograd, "conv2d", counting)
    return seen


def trained(model):
    """Give the running statistics and weights values of their own."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
    return model.eval()


def images(n=4, size=16, dtype=torch.float64):
    return torch.rand(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))


def logits_and_gradient(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]


def test_many_channels_go_winograds_way_and_give_the_models_logits_and_gradients_as_weights_change(taken):
    torch.manual_seed(0)
    model = trained(Net().double())
    twin = fold_batchnorm(model)
    for _ in range(2):
        before = dict(taken)
        for ours, truth in zip(logits_and_gradient(twin, images()), logits_and_gradient(model, images())):
            torch.testing.assert_close(ours, truth, rtol=0, atol=1e-10)
        assert taken["winograd"] == before["winograd"] + 2  # first and second; the stem has three channels
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        twin.refresh()


def test_in_float32_the_gradients_agree_to_float32(taken):
    torch.manual_seed(0)
    model = trained(Net())
    x = images(dtype=torch.float32)
    for ours, truth in zip(logits_and_gradient(fold_batchnorm(model), x), logits_and_gradient(model, x)):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-4 * truth.abs().max().item())
    assert taken["winograd"] == 2


@pytest.mark.parametrize(("change", "times"), [({"width": 156}, 0), ({"stride": 2}, 1), ({}, 2)])
def test_few_channels_and_strides_are_computed_directly(change, times, taken):
    fold_batchnorm(trained(Net(**change).double()))(images(n=8))
    assert taken["winograd"] == times


def test_a_few_small_images_are_computed_directly(taken):
    twin = fold_batchnorm(trained(Net().double()))
    twin(images(n=1, size=8))
    assert taken["winograd"] == 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [(3, 3, 3), (4, 8, 8)], ids=str)
def test_images_that_do_not_fit_are_refused_in_torchs_words_and_spoil_nothing(size, autocast):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU()))
    twin, x = fold_batchnorm(model), images(n=2, size=8, dtype=torch.float32)
    wrong = torch.rand(2, *size)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        twin.refresh()
        with pytest.raises(RuntimeError) as theirs:
            model(wrong)
        with pytest.raises(RuntimeError) as ours:
            twin(wrong)
        assert str(ours.value) == str(theirs.value)
        torch.testing.assert_close(twin(x), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("autocast", [False, True])
def test_threads_may_share_a_twin(autocast):
    model = trained(Net(width=256))
    twin = fold_batchnorm(model)
    batches = [images(n, size, dtype=torch.float32) for n, size in ((1, 4), (16, 8), (3, 6), (2, 4))]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        truth = [logits_and_gradient(fold_batchnorm(model), x) for x in batches]
        for _ in range(2 if autocast else 5):  # bfloat16 is slow without its instructions
            twin.refresh()
            with ThreadPoolExecutor(len(batches)) as pool:
                found = list(pool.map(lambda x: logits_and_gradient(twin, x), batches))
            for ours, theirs in zip(found, truth):
                for a, t in zip(ours, theirs):
                    assert (a - t).norm() <= 1e-2 * t.norm()


def test_under_autocast_it_is_torchs_convolution(taken):
    torch.manual_seed(0)
    model = trained(Net())
    twin, x = fold_batchnorm(model), images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert twin.refresh()(x).dtype is torch.bfloat16
    assert taken["winograd"] == 0


def test_the_switch_in_the_environment_turns_kernels_off(taken, monkeypatch):
    torch.manual_seed(0)
    model = trained(Net().double())
    monkeypatch.setenv("AT_EXTENSIONS_KERNELS", "0")
    without = fold_batchnorm(model)
    monkeypatch.setenv("AT_EXTENSIONS_KERNELS", "1")
    outcomes = [logits_and_gradient(twin, images()) for twin in (without, fold_batchnorm(model))]
    assert taken["winograd"] == 2  # those of the second twin
    assert all(type(module) is not WinogradConv2d for module in without.modules())
    for ours, truth in zip(*outcomes):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-10)
    monkeypatch.setenv("AT_EXTENSIONS_KERNELS", "off")
    with pytest.raises(ValueError, match=r"must be 0 .* or 1, got 'off'"):
        fold_batchnorm(model)


def test_memory_for_transformed_weights_is_bounded(taken, monkeypatch):
    monkeypatch.setattr(convolution, "_TRANSFORMED", 3 * 36 * 160**2)
    model = trained(Net().double())
    twin = fold_batchnorm(model)
    for ours, truth in zip(logits_and_gradient(twin, images()), logits_and_gradient(model, images())):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-10)
    assert taken["winograd"] == 1  # of two, as one alone has two times 36 x 160 x 160 numbers


def test_a_hooked_or_padded_otherwise_convolution_stays_what_it_is(taken):
    model = trained(Net().double())
    model.second.padding_mode = "reflect"
    model.second._reversed_padding_repeated_twice = [1, 1, 1, 1]
    model.first.register_forward_hook(lambda module, inputs, output: 2 * output)
    twin = fold_batchnorm(model)
    assert type(twin.network.first) is nn.Conv2d
    for ours, truth in zip(logits_and_gradient(twin, images()), logits_and_gradient(model, images())):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-10)
    assert taken["winograd"] == 0


def test_a_twin_that_has_run_can_be_copied_and_pickled_and_its_model_keeps_its_class():
    model = trained(Net().double())
    twin = fold_batchnorm(model)
    expected = twin(images())
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert torch.equal(other(images()), expected)
    assert type(twin.network.second) is WinogradConv2d
    assert type(model.second) is nn.Conv2d
    assert "_transformed" not in vars(model.second)


def test_a_gradient_is_that_of_the_weights_the_forward_pass_had():
    model = trained(Net().double())
    conv = fold_batchnorm(model).network.second
    x = torch.rand(4, 160, 8, 8, dtype=torch.float64, requires_grad=True)
    truth = torch.autograd.grad(model.second(x).square().sum(), x)[0]
    y = conv(x)
    conv.weight = nn.Parameter(torch.zeros_like(conv.weight))
    conv.forget()
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], truth, rtol=0, atol=1e-10)
    assert conv(x).isclose(conv.bias.view(1, -1, 1, 1)).all()
