"""Class-wise radii: RobustLT's formula, each class in its own ball, and nothing else changed."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from at_extensions.attacks import PGD, ClassEpsPGD, RandomStream, perturb, robust_lt_scales
from at_extensions.data import long_tail_counts
from at_extensions.methods import BalancedSoftmaxAT


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=20), st.floats(0, 0.99))
def test_robust_lt_scales_are_one_on_average_and_grow_toward_rare_classes(counts, strength):
    scales = robust_lt_scales(counts, strength)
    assert sum(n * s for n, s in zip(counts, scales)) / sum(counts) == pytest.approx(1, abs=1e-9)
    by_count = [s for _, s in sorted(zip(counts, scales), key=lambda pair: -pair[0])]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(by_count))


def test_robust_lt_scales_follow_the_formula():
    counts, a = long_tail_counts(5000, 10, 0.02), 0.3
    rarity = [math.log(5000 / n) ** 0.5 for n in counts]
    tau = a / sum(n / 13996 * r for n, r in zip(counts, rarity))
    assert robust_lt_scales(counts, a) == pytest.approx([1 - a + tau * r for r in rarity], rel=1e-12)
    assert robust_lt_scales([7, 7, 7]) == [1.0, 1.0, 1.0]
    assert robust_lt_scales(counts, 0) == [1.0] * 10


@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero"])
def test_on_a_linear_model_each_class_reaches_the_corner_of_its_own_ball(linear_net, batch, start):
    net, (images, labels) = linear_net(1), batch(2, 12, num_classes=2)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    direction = (net[1].weight[1 - labels] - net[1].weight[labels]).sign().view_as(images)
    best = (images + (0.1 * scales[labels]).view(-1, 1, 1, 1) * direction).clamp(0, 1)
    adversarial = ClassEpsPGD(net, scales, eps=0.1, alpha=0.05, steps=10, start=start)(images, labels)
    torch.testing.assert_close(adversarial, best, rtol=0, atol=1e-15)


def test_uniform_starts_fill_the_ball_of_the_class(linear_net):
    net, images = linear_net(1), torch.full((200, 2, 5, 5), 0.5, dtype=torch.float64)
    labels = torch.arange(200) % 2
    moved = perturb(ClassEpsPGD(net, [0.5, 2.0], 0.1, 1e-12, 1), images, labels, stream=RandomStream(3)) - images
    for c, radius in enumerate((0.05, 0.2)):
        assert 0.98 * radius < moved[labels == c].abs().max() <= radius + 1e-9
        assert moved[labels == c].abs().mean() == pytest.approx(radius / 2, rel=0.05)


def test_equal_scales_are_plain_pgd(small_net, batch, untouched):
    net, (images, labels) = small_net(4, train=False), batch(5)
    with untouched(net):
        ours = perturb(ClassEpsPGD(net, [1, 1, 1], 0.1, 0.03, 3), images, labels, stream=RandomStream(6))
    plain = perturb(PGD(net, 0.1, 0.03, 3), images, labels, stream=RandomStream(6))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-14)


def test_methods_take_it_as_an_option(small_net, batch):
    net, (images, labels) = small_net(7), batch(8, 12)
    method = BalancedSoftmaxAT(net, [90, 9, 1], eps=0.02, alpha=0.02, steps=6, class_eps=0.3)
    assert method.attack.eps == 0.02
    moved = (method.perturb(images, labels) - images).abs().amax((1, 2, 3))
    expected = 0.02 * torch.tensor(robust_lt_scales([90, 9, 1], 0.3), dtype=torch.float64)[labels]
    assert (moved <= expected + 1e-12).all()
    assert (moved > 0.9 * expected).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda net: robust_lt_scales([5, 0]), r"class_counts\[1\] must be at least 1, got 0"),
        (lambda net: robust_lt_scales([5, 1], 1.0), r"strength must lie in \[0, 1\)"),
        (lambda net: ClassEpsPGD(net, [1.0, 0.0]), r"scales\[1\] must lie in \(0, inf\)"),
        (lambda net: ClassEpsPGD(net, [1.0]), "at least 2, got 1"),
        (lambda net: ClassEpsPGD(net, [1.0, 3.0], eps=0.5), r"eps times the largest scale must lie in \(0, 1\]"),
        (lambda net: ClassEpsPGD(net, [1.0, 3.0], eps=8), "did you mean 8/255"),
    ],
)
def test_bad_input_is_refused(linear_net, make, says):
    with pytest.raises(ValueError, match=says):
        make(linear_net())
