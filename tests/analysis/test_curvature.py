"""Input curvature against the closed form and torch's own Hessian, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

from at_extensions.analysis import input_curvature


class Saddle(nn.Module):
    """Logits (z, 0) with z = x1 + x1 x2; the cross-entropy of class 0 is softplus(-z)."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        x1, x2 = x.flatten(1).unbind(1)
        z = x1 + self.a * x1 * x2
        return torch.stack([z, torch.zeros_like(z)], 1)


def a_net(smooth=True, size=8, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        act = nn.Tanh() if smooth else nn.ReLU()
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), act, nn.Dropout(0.5), nn.Flatten(), nn.Linear(3 * (size - 2) ** 2, 4)
        ).to(dtype)
        net(torch.rand(16, 1, size, size, dtype=dtype))  # statistics of its own
    return net


def images(n=5, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, size, size, generator=generator, dtype=dtype), torch.arange(n) % 4


def truth(net, x, y, k):
    """The k eigenvalues of largest magnitude from the whole Hessian of each sample."""
    net.eval()
    rows = []
    for i in range(len(x)):
        full = hessian(lambda point, i=i: F.cross_entropy(net(point), y[i : i + 1]), x[i : i + 1])
        values = torch.linalg.eigvalsh(full.reshape(x[0].numel(), -1))
        rows.append(values[values.abs().argsort(descending=True)][:k])
    net.train()
    return torch.stack(rows)


def test_both_eigenvalues_equal_the_closed_form():
    found = input_curvature(
        Saddle(), torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.long), k=2
    )
    assert found.eigenvalues[0].tolist() == pytest.approx([0.640388, -0.390388], abs=1e-6)
    assert found.largest.item() == pytest.approx(0.640388, abs=1e-6)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(("size", "k"), [(5, 3), (8, 1), (8, 4), (8, 40)])
def test_eigenvalues_equal_those_of_the_whole_hessian(smooth, size, k):
    if size == 5:
        k = min(k, 25)
    net, (x, y) = a_net(smooth, size), images(size=size)
    found = input_curvature(net, x, y, k=k, tol=1e-10).eigenvalues
    expected = truth(net, x, y, k)
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-7, atol=1e-9)
    if k < 5:
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_a_sample_is_measured_by_itself_and_in_float32():
    net, (x, y) = a_net(dtype=torch.float32), images(dtype=torch.float32)
    all_of_them = input_curvature(net, x, y, k=2).eigenvalues
    alone = torch.cat([input_curvature(net, x[i : i + 1], y[i : i + 1], k=2).eigenvalues for i in range(len(x))])
    torch.testing.assert_close(all_of_them, alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(all_of_them, truth(copy.deepcopy(net).double(), x.double(), y, 2), rtol=1e-3, atol=1e-5)


def test_a_flat_loss_has_no_curvature():
    net = a_net()
    with torch.no_grad():
        net[5].weight.zero_()
    x, y = images()
    assert not input_curvature(net, x, y, k=2).eigenvalues.any()

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.bias.expand(len(x), 4)

    assert not input_curvature(Constant(), x, y).eigenvalues.any()


def test_the_model_is_left_as_it_was(untouched):
    net, (x, y) = a_net(), images()
    net.train()
    with untouched(net):
        input_curvature(net, x, y)


def test_bad_input_is_refused():
    net, (x, y) = a_net(), images()
    with pytest.raises(ValueError, match="at most the number of pixels, 64"):
        input_curvature(net, x, y, k=65)
    with pytest.raises(ValueError, match="k must be at least 1"):
        input_curvature(net, x, y, k=0)
    with pytest.raises(ValueError, match="labels"):
        input_curvature(net, x, y[:2])


def test_it_prints_and_is_plain_data():
    found = input_curvature(a_net(), *images())
    assert "5 samples" in repr(found)
    assert found.to_dict()["eigenvalues"] == found.eigenvalues.tolist()
