"""Batches that cannot be right do not train a model without a word."""

import copy

import pytest
import torch
from torch import nn
from toys import Visits, a_net

from at_extensions.methods import FGSMAT, PGDAT, Standard, Wrapping
from at_extensions.methods._guard import READ_EVERY


def a_batch(seed=0, n=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator)


def pgd(net=None):
    return PGDAT(a_net() if net is None else net, eps=0.1, alpha=0.05, steps=2)


X, Y = a_batch()
IMAGES = {
    "normalised": (X * 4 - 2, ValueError, "normalisation belongs inside the model"),
    "0..255": (X * 255, ValueError, r"use images / 255"),
    "slightly above 1": (X * 1.01, ValueError, r"must lie in \[0, 1\]"),
    "NaN": (X.clone().index_fill_(0, torch.tensor([3]), float("nan")), ValueError, "not finite"),
    "inf": (X.clone().index_fill_(0, torch.tensor([3]), float("inf")), ValueError, "not finite"),
    "bytes": ((X * 255).byte(), TypeError, r"images\.float\(\) / 255"),
    "no batch": (X[0], ValueError, r"shape \(B, C, H, W\)"),
    "empty": (X[:0], ValueError, "empty"),
    "array": (X.numpy(), TypeError, "torch tensor"),
}
LABELS = {
    "float": (Y.float(), TypeError, r"labels\.long\(\)"),
    "column": (Y[:, None], ValueError, r"labels\.squeeze\(1\)"),
    "one-hot": (nn.functional.one_hot(Y, 4), ValueError, r"labels\.argmax\(1\)"),
    "soft": (nn.functional.one_hot(Y, 4).double(), TypeError, "one-hot or soft"),
    "ignored": (torch.where(Y == 1, -100, Y), ValueError, "leave out samples without a class"),
    "too large": (Y + 1, ValueError, "from 0 to 3"),
    "fewer": (Y[:-1], ValueError, "7 labels for 8 images"),
    "list": (Y.tolist(), TypeError, "torch tensor"),
}


@pytest.mark.parametrize("make", [pgd, lambda: Wrapping(pgd()), lambda: Standard(a_net())])
@pytest.mark.parametrize("kind", IMAGES)
def test_the_first_batchs_images_are_refused_before_anything_changes(kind, make, untouched):
    images, error, says = IMAGES[kind]
    method = make()
    with untouched(method.model), pytest.raises(error, match=says):
        method(images, Y[: max(len(images), 1)] if kind != "no batch" else Y[:1])


@pytest.mark.parametrize("kind", LABELS)
def test_the_first_batchs_labels_are_refused_before_anything_changes(kind, untouched):
    labels, error, says = LABELS[kind]
    method = pgd()
    with untouched(method.model), pytest.raises(error, match=says):
        method(X, labels)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.int16])
def test_labels_of_any_integer_dtype_train_alike(dtype):
    expected = pgd()(X, Y)
    method = pgd()
    for _ in range(2):
        step = method(X, Y.to(dtype))
        assert torch.isfinite(step.loss)
    assert torch.equal(pgd()(X, Y.to(dtype)).loss, expected.loss)


LATER = {
    "normalised": (IMAGES["normalised"][0], Y, "images outside"),
    "0..255": (IMAGES["0..255"][0], Y, "images outside"),
    "NaN": (IMAGES["NaN"][0], Y, "images outside"),
    "inf": (IMAGES["inf"][0], Y, "images outside"),
    "too large": (X, Y + 1, "no class numbers from 0 to 3"),
    "ignored": (X, LABELS["ignored"][0], "no class numbers"),
    "both": (X * 2, Y + 1, "images outside .* and labels"),
}


@pytest.mark.parametrize("make", [pgd, lambda: Wrapping(pgd()), lambda: FGSMAT(a_net(), eps=0.1)])
@pytest.mark.parametrize("kind", LATER)
def test_a_later_bad_batch_adds_nothing_and_raises_at_the_epochs_end(kind, make, no_host_sync):
    images, labels, says = LATER[kind]
    method = make()
    method(X, Y)
    before = copy.deepcopy(method.model.state_dict())
    with no_host_sync():
        step = method(images, labels)
        step.loss.backward()
    assert step.loss == 0
    assert all((p.grad == 0).all() for p in method.model.parameters())
    assert all(torch.isfinite(value).all() for value in method.model.state_dict().values())
    for name, p in method.model.named_parameters():
        assert torch.equal(p, before[name])
    assert method(X, Y).loss > 0  # the flag stays on the device until it is read
    with pytest.raises(ValueError, match=says):
        method.epoch_end()
    method.epoch_end()  # read once


def test_a_loop_without_epoch_ends_is_told_too(monkeypatch):
    method = Standard(a_net())
    method(X, Y)
    method(X * 2, Y)

    def train_on():
        for _ in range(READ_EVERY):
            method(X, Y)

    with pytest.raises(ValueError, match="images outside"):
        train_on()


def test_good_batches_are_trained_on_as_they_are():
    method, plain = pgd(), pgd()
    for seed in range(3):
        x, y = a_batch(seed)
        plain._guard = type(plain._guard)()  # every batch is a first one, which is passed on untouched
        a, b = method(x, y), plain(x, y)
        assert torch.equal(a.x_adv, b.x_adv)
        assert torch.equal(a.loss, b.loss)
        a.loss.backward()
        b.loss.backward()
    for ours, theirs in zip(method.parameters(), plain.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


class Auxiliary(nn.Module):
    """Returns a second output while it trains, as GoogLeNet and distilled transformers do."""

    def __init__(self):
        super().__init__()
        self.net = a_net()

    def forward(self, x):
        return (self.net(x), x.mean()) if self.training else self.net(x)


class Softmaxed(Auxiliary):
    def forward(self, x):
        return self.net(x).softmax(1)


class FewerClasses(Auxiliary):
    def forward(self, x):
        return self.net(x) if self.training else self.net(x)[:, :3]


class Flat(Auxiliary):
    def forward(self, x):
        return self.net(x)[:, 0]


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [(Auxiliary, TypeError, "got tuple in train mode"), (Softmaxed, ValueError, "probabilities, not logits"),
     (FewerClasses, ValueError, "in train mode, .* in eval mode"), (Flat, ValueError, r"logits \(B, K\)")],
)  # fmt: skip
def test_outputs_that_are_no_logits_are_refused_in_the_mode_where_they_occur(model, error, says, untouched):
    net = model()
    method = pgd(net)
    with untouched(net), pytest.raises(error, match=says):
        method(X, Y)


def test_another_range_can_be_declared():
    method = Visits(pgd(), 8)
    method.image_range = (-0.1, 1.1)
    index = torch.arange(8)
    for _ in range(2):
        assert torch.isfinite(method(X * 1.2 - 0.1, Y, index).loss)
    method.epoch_end()
    method(X * 1.3, Y, index)
    with pytest.raises(ValueError, match=r"\[-0\.1, 1\.1\]"):
        method.epoch_end()


def test_a_distributed_wrapper_is_no_model(monkeypatch):
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", lambda self: nn.Module.__init__(self))
    with pytest.raises(ValueError, match="wrap the method"):
        pgd(nn.parallel.DistributedDataParallel())


def test_a_methods_own_faults_are_reported(no_host_sync):
    method = pgd()
    method(X, Y)
    with no_host_sync():
        method.flag("indices beyond the table", torch.tensor(True))
        method.flag("indices beyond the table", torch.tensor(False))
    with pytest.raises(ValueError, match="indices beyond the table"):
        method.check()
