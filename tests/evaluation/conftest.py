"""Small models whose robustness is known, and data for them."""

import pytest
import torch
from torch import nn

import at_extensions  # noqa: F401  (serves autoattack)


class Linear(nn.Module):
    """Logits W x + b of flattened images: its distance to the decision boundary is known in closed form."""

    def __init__(self, classes, shape=(3, 6, 6), seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = torch.Size(shape).numel()
        self.weight = nn.Parameter(torch.randn(classes, size, generator=generator) / size**0.5)
        self.bias = nn.Parameter(-self.weight.detach().sum(1) / 2)  # grey is undecided

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, linear layer."""

    def __init__(self, classes=4, channels=3, side=6, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
            )
            self.head = nn.Linear(6 * side * side, classes)
            self.body[1].running_mean.normal_(0, 0.1)
            self.body[1].running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.head(self.body(x))


def images(n, shape=(3, 6, 6), seed=1, low=0.25, high=0.75):
    """Images away from the faces of the box, so that it does not bind."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(n, *shape, generator=generator)


@torch.no_grad()
def labelled_by(model, x, wrong=0):
    """The model's own labels, but for the first ``wrong``, which are others."""
    mode = model.training
    logits = model.eval()(x)
    model.train(mode)
    y = logits.argmax(1)
    y[:wrong] = (y[:wrong] + 1) % logits.shape[1]
    return y


@pytest.fixture
def linear():
    return Linear


@pytest.fixture
def net():
    return Net


@pytest.fixture
def make_images():
    return images


@pytest.fixture
def label():
    return labelled_by


@pytest.fixture
def small_suite(monkeypatch):
    """Attacks of few steps, for tests that are about what surrounds them."""
    shrink(monkeypatch)


def shrink(monkeypatch):
    """Give every attack few steps."""
    from at_extensions.evaluation import suite

    make = suite.make_attackers

    def small(*args, **kwargs):
        attackers = make(*args, **kwargs)
        for attack in (attackers.apgd, attackers.apgd_targeted):
            attack.n_iter = attack.n_iter_orig = 10
        attackers.fab.n_iter = 10
        return attackers

    def apply(attackers, version, norm):
        suite_apply(attackers, version, norm)
        attackers.square.n_queries = 100

    suite_apply = suite.apply_version
    from at_extensions.evaluation import autoattack
    from at_extensions.evaluation.served import autoattack as served

    for module in (autoattack, served):
        monkeypatch.setattr(module, "make_attackers", small)
        monkeypatch.setattr(module, "apply_version", apply)
