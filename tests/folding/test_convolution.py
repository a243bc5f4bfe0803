"""A twin's convolutions: which way each takes, and that all ways give what the model gives."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from at_extensions.folding import convolution, few_pixels, fold_batchnorm, onednn, two_way, winograd
from at_extensions.folding.convolution import FastConv2d


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
    """What goes through Winograd's ways, and what is computed as few pixels."""
    seen = {"winograd": 0, "rows": 0, "few_pixels": 0}

    of_few = few_pixels.conv2d

    def counting(*args):
        seen["few_pixels"] += 1
        return of_few(*args)

    def by_kind(x, kernel, bias):
        seen["winograd" if kernel.forward.func is winograd._convolve else "rows"] += 1
        return convolve(x, kernel, bias)

    convolve = two_way.conv2d
    monkeypatch.setattr(two_way, "conv2d", by_kind)
    monkeypatch.setattr(few_pixels, "conv2d", counting)
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
    assert taken["few_pixels"] == taken["rows"] == 0


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
        for _ in range(5):
            twin.refresh()
            with ThreadPoolExecutor(len(batches)) as pool:
                found = list(pool.map(lambda x: logits_and_gradient(twin, x), batches))
            for ours, theirs in zip(found, truth):
                for a, t in zip(ours, theirs):
                    assert (a - t).norm() <= 1e-2 * t.norm()


@pytest.mark.skipif(not onednn.is_available(torch.bfloat16), reason="no oneDNN, or none in bfloat16")
@pytest.mark.parametrize(
    ("n", "size", "change", "expected"),
    [
        (16, 4, {}, {"rows": 2}),  # 16 x 2 pairs of columns
        (15, 4, {}, {"few_pixels": 2}),
        (15, 8, {}, {"rows": 2}),
        (15, 8, {"stride": 2}, {"few_pixels": 1}),  # the second's rows are 15 x 2 pairs, its weights a third as many
        (4, 8, {}, {}),
        (16, 4, {"width": 208}, {}),
    ],
)
def test_bfloat16_goes_along_rows_or_leaves_channels_last_where_that_is_faster(n, size, change, expected, taken):
    torch.manual_seed(0)
    settings = {"width": 384} | change
    model = trained(Net(**settings))
    twin, x = fold_batchnorm(model), images(n, size, dtype=torch.float32)
    if settings.get("stride") == 2:
        twin.network.second.may_pack = False
    with torch.autocast("cpu", torch.bfloat16):
        twin.refresh()
        ours = logits_and_gradient(twin, x)
        assert taken == {"winograd": 0, "rows": 0, "few_pixels": 0} | expected
        for conv in (twin.network.stem, twin.network.first, twin.network.second):
            conv.may_pack = False
        plain = logits_and_gradient(twin, x)
    truth = logits_and_gradient(model, x)
    for a, p, t in zip(ours, plain, truth):
        assert (a.float() - t).norm() < 1.2 * (p.float() - t).norm() < 0.1 * t.norm()
    assert ours[1].is_contiguous()


def test_the_weights_that_were_kept_are_forgotten_in_bfloat16_too():
    torch.manual_seed(0)
    model = trained(Net(width=384))
    twin, x = fold_batchnorm(model), images(size=4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        before = twin.refresh()(x)
        with torch.no_grad():
            model.second.weight.neg_()
            model.first.weight.neg_()
        after = twin.refresh()(x)
        again = fold_batchnorm(model).refresh()(x)
    assert not torch.allclose(before, after)
    assert torch.equal(after, again)


def test_memory_for_transformed_weights_is_bounded(taken, monkeypatch):
    monkeypatch.setattr(convolution, "_DERIVED", 3 * 36 * 160**2)
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
    assert type(twin.network.second) is FastConv2d
    assert type(model.second) is nn.Conv2d
    assert "_of_weight" not in vars(model.second)


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
