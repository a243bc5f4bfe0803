"""Label noise: the transition matrix of each kind, drawn from the given generator alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at_extensions.data import corrupt_labels


def transitions(rate, kind, num_classes=4, each=20000):
    """Measured probabilities (K, K) of true label -> given label."""
    labels = torch.arange(num_classes).repeat_interleave(each)
    noisy = corrupt_labels(labels, num_classes, rate, kind=kind, generator=torch.Generator().manual_seed(0))
    joint = torch.bincount(labels * num_classes + noisy, minlength=num_classes**2)
    return joint.reshape(num_classes, num_classes).double() / each


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_uniform_noise_has_the_papers_transition_matrix(rate):
    expected = rate / 4 * torch.ones(4, 4) + (1 - rate) * torch.eye(4)
    assert torch.allclose(transitions(rate, "uniform"), expected.double(), atol=0.015)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_other_noise_is_wrong_at_the_rate(rate):
    expected = rate / 3 * (torch.ones(4, 4) - torch.eye(4)) + (1 - rate) * torch.eye(4)
    measured = transitions(rate, "other")
    assert torch.allclose(measured, expected.double(), atol=0.015)
    if rate == 1:
        assert measured.diagonal().tolist() == [0, 0, 0, 0]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=50),
    st.floats(0, 1),
    st.sampled_from(["uniform", "other"]),
    st.integers(0, 9),
)
def test_noise_is_seeded_and_leaves_its_input_and_the_global_state(labels, rate, kind, seed):
    labels = torch.tensor(labels)
    before, state = labels.clone(), torch.get_rng_state()
    first = corrupt_labels(labels, 3, rate, kind=kind, generator=torch.Generator().manual_seed(seed))
    again = corrupt_labels(labels, 3, rate, kind=kind, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(first, again)
    assert torch.equal(labels, before)
    assert torch.equal(state, torch.get_rng_state())
    assert first.min() >= 0
    assert first.max() < 3


def test_more_noise_keeps_the_labels_that_less_noise_changed():
    labels = torch.zeros(500, dtype=torch.long)
    some, more = (corrupt_labels(labels, 9, r, generator=torch.Generator().manual_seed(1)) for r in (0.2, 0.6))
    assert torch.equal(more[some != 0], some[some != 0])
    assert (more != 0).sum() > (some != 0).sum()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rate": -0.1}, ValueError, "label noise rate"),
        ({"rate": 1.01}, ValueError, "label noise rate"),
        ({"rate": "a lot"}, TypeError, "label noise rate"),
        ({"kind": "symmetric"}, ValueError, "unknown label noise kind"),
        ({"num_classes": 2}, ValueError, "class numbers from 0 to 1"),
        ({"labels": torch.rand(3)}, TypeError, "integer"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {"labels": torch.tensor([0, 1, 2]), "num_classes": 3, "rate": 0.5, "kind": "uniform"}
    with pytest.raises(error, match=message):
        corrupt_labels(**{**good, **change}, generator=torch.Generator())
