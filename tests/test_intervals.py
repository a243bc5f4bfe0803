"""Intervals: against SciPy, against closed forms, and their coverage."""

import numpy as np
import pytest
import scipy.stats
import torch

from at_extensions.experiments import paired_bootstrap, paired_interval, wilson_interval


def test_paired_interval_equals_scipys_interval_of_the_differences():
    a, b = {0: 0.5, 1: 0.7, 2: 0.6, 7: 0.9}, {2: 0.5, 1: 0.55, 0: 0.52, 9: 0.1}
    found = paired_interval(a, b, confidence=0.9)
    expected = scipy.stats.ttest_rel([0.5, 0.7, 0.6], [0.52, 0.55, 0.5]).confidence_interval(0.9)
    assert found.seeds == (0, 1, 2)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx((-0.02 + 0.15 + 0.1) / 3)


def test_too_few_common_seeds_give_no_interval():
    assert paired_interval({0: 1.0}, {1: 2.0}).to_dict() == {"seeds": [], "differences": []}
    one = paired_interval({0: 1.0, 1: 3.0}, {0: 0.25, 2: 2.0})
    assert one.to_dict() == {"seeds": [0], "differences": [0.75], "mean": 0.75, "interval": None, "differs": None}


@pytest.mark.parametrize(("shift", "differs"), [(0.0, False), (1.0, True)])
def test_a_difference_is_told_only_when_the_interval_excludes_zero(shift, differs):
    a = {0: 0.1 + shift, 1: -0.1 + shift, 2: 0.05 + shift}
    assert paired_interval(a, dict.fromkeys(a, 0.0)).differs is differs


def test_bootstrap_agrees_with_scipys():
    generator = np.random.default_rng(0)
    a, b = generator.random(300) < 0.6, generator.random(300) < 0.45
    found = paired_bootstrap(torch.from_numpy(a), b.tolist(), resamples=20_000)
    expected = scipy.stats.bootstrap(
        (a.astype(float), b.astype(float)), lambda x, y, axis: (x - y).mean(axis), paired=True, method="percentile",
        n_resamples=20_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.interval == pytest.approx((expected.low, expected.high), abs=0.008)


def test_bootstrap_uses_the_pairing():
    hard = np.random.default_rng(0).random(1000) < 0.5
    better = hard.copy()
    better[np.flatnonzero(~hard)[:20]] = True  # 20 of 1000 samples differ, all in one direction
    paired = paired_bootstrap(better, hard)
    assert paired.differs
    assert paired.interval[1] - paired.interval[0] < 0.02
    shuffled = paired_bootstrap(np.random.default_rng(1).permutation(better), hard)
    assert shuffled.interval[1] - shuffled.interval[0] > 0.06


def test_bootstrap_covers_the_true_difference_as_often_as_promised():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        a, b = generator.random((2, 200)) < np.array([[0.5], [0.4]])
        low, high = paired_bootstrap(a, b, confidence=0.9, resamples=1000, seed=trial).interval
        covered += low <= 0.1 <= high
    assert 0.85 < covered / 300 < 0.95


def test_bootstrap_of_real_numbers_in_blocks_equals_one_block(monkeypatch):
    from at_extensions import intervals

    a, b = np.random.default_rng(0).random((2, 40))
    whole = paired_bootstrap(a, b, resamples=500)
    assert paired_bootstrap(a, b, resamples=500) == whole
    monkeypatch.setattr(intervals, "_BLOCK", 40 * 7)
    assert paired_bootstrap(a, b, resamples=500).interval == pytest.approx(whole.interval, rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [([1, 0], [1], "same samples"), ([], [], "same samples"), ([[1]], [[1]], "same samples"),
     ([float("nan")], [1], "finite")],
)  # fmt: skip
def test_bootstrap_refuses_samples_that_cannot_be_paired(a, b, word):
    with pytest.raises(ValueError, match=word):
        paired_bootstrap(a, b)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_outside_0_and_1_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        paired_bootstrap([1, 0], [0, 0], confidence=confidence)
    with pytest.raises(ValueError, match="confidence"):
        paired_interval({0: 1.0}, {0: 1.0}, confidence=confidence)


def test_wilson_interval_equals_scipys():
    expected = scipy.stats.binomtest(37, 200).proportion_ci(method="wilson")
    assert wilson_interval(37, 200) == pytest.approx((expected.low, expected.high), rel=1e-6)
