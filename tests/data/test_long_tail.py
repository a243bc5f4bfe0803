"""Long tails: the published counts, and cuts that keep them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at_extensions.data import is_long_tailed, long_tail_counts
from at_extensions.data.long_tail import kept_samples, largest_head
from at_extensions.data.split import seeded_generator

CIFAR10 = {  # REAT's table (arXiv 2307.10205)
    0.1: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    0.05: [5000, 3584, 2569, 1842, 1320, 946, 678, 486, 348, 250],
    0.02: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    0.01: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
}
CIFAR100 = {0.2: (24856, 100), 0.1: (19573, 50), 0.05: (15907, 25), 0.02: (12608, 10), 0.01: (10847, 5)}


@pytest.mark.parametrize("ratio", CIFAR10)
def test_cifar10_counts_are_the_published_ones(ratio):
    assert long_tail_counts(5000, 10, ratio) == CIFAR10[ratio]


@pytest.mark.parametrize("ratio", CIFAR100)
def test_cifar100_counts_are_the_published_ones(ratio):
    counts = long_tail_counts(500, 100, ratio)
    assert (counts[0], sum(counts), counts[-1]) == (500, *CIFAR100[ratio])


def test_a_step_keeps_the_first_half_whole():
    assert long_tail_counts(100, 4, 0.1, "step") == [100, 100, 10, 10]
    assert long_tail_counts(100, 5, 0.1, "step") == [100, 100, 100, 10, 10]


def test_floating_point_does_not_cost_a_sample():
    assert int(100 * 0.29) == 28
    assert long_tail_counts(100, 2, 0.29) == [100, 29]
    assert long_tail_counts(100, 2, 0.29, "step") == [100, 29]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 300), min_size=2, max_size=12),
    st.floats(0.2, 1),
    st.sampled_from(["exp", "step"]),
)
def test_the_head_is_the_largest_that_every_class_can_follow(available, ratio, kind):
    head = largest_head(available, ratio, kind)

    def fits(n_max):
        if n_max < 1 / ratio:  # too small for a tail: the count function refuses it
            return True
        return all(n <= there for n, there in zip(long_tail_counts(n_max, len(available), ratio, kind), available))

    assert fits(head)
    assert not fits(max(head + 1, 6))


def test_equal_classes_keep_their_head_whole():
    assert largest_head([5000] * 10, 0.02) == 5000
    assert largest_head([37] * 3, 0.5, "step") == 37


def test_a_cut_keeps_the_counts_and_is_nested():
    labels = torch.arange(400) % 4
    many = kept_samples(labels, [100, 50, 20, 5], seeded_generator(3))
    few = kept_samples(labels, [100, 25, 10, 2], seeded_generator(3))
    assert torch.bincount(labels[many]).tolist() == [100, 50, 20, 5]
    assert set(few.tolist()) < set(many.tolist())
    assert many.tolist() == sorted(set(many.tolist()))
    other = kept_samples(labels, [100, 50, 20, 5], seeded_generator(4))
    assert set(other.tolist()) != set(many.tolist())


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, float("nan")])
def test_ratios_outside_the_unit_interval_are_refused(ratio):
    with pytest.raises(ValueError, match=r"imbalance_ratio must lie in \(0, 1\]"):
        long_tail_counts(100, 10, ratio)


def test_an_empty_class_is_refused_with_the_ratio_that_would_do():
    with pytest.raises(ValueError, match=r"leaves class 7 of 10 without samples.*at least 0\.02"):
        long_tail_counts(50, 10, 0.006)
    assert min(long_tail_counts(50, 10, 0.02)) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 10, 0.1), ValueError, "n_max"),
        ((10.5, 10, 0.1), TypeError, "n_max"),
        ((10, 1, 0.1), ValueError, "num_classes"),
        ((10, 3, "0.1"), TypeError, "imbalance_ratio"),
        ((10, 3, 0.1, "exponential"), ValueError, "unknown imbalance kind 'exponential'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        long_tail_counts(*arguments)


def test_a_long_tail_is_less_than_half_of_the_head():
    assert is_long_tailed([10, 4, 7])
    assert not is_long_tailed([10, 5])
    assert not is_long_tailed([178, 182, 177])
    assert not is_long_tailed([10, 0])  # a class without samples is no tail
