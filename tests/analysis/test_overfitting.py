"""Robust overfitting on histories with a known onset, bootstrap intervals, and detection of planted label noise."""

import itertools
import json
import math

import pytest
import torch

from at_extensions.analysis import label_agreement, robust_overfitting


def history(robust, train=None):
    train = [0.3 + 0.01 * i for i in range(len(robust))] if train is None else train
    return [
        {"epoch": i + 1, "val_robust_accuracy": r, "train_accuracy": t} for i, (r, t) in enumerate(zip(robust, train))
    ]


RISE, FALL = [0.30, 0.38, 0.44, 0.48, 0.50], [0.45, 0.43, 0.42, 0.41, 0.40]


def test_a_fall_after_the_best_is_found_with_its_onset():
    found = robust_overfitting(history(RISE + FALL), smoothing=1)
    assert (found.onset, found.best_epoch, found.best, found.last) == (6, 5, 0.50, 0.40)
    assert found.gap == pytest.approx(0.10)
    assert found.overfits
    assert "since epoch 6" in found.advice
    assert "weights of epoch 5" in found.advice
    assert json.loads(json.dumps(found.to_dict()))["overfits"] is True


@pytest.mark.parametrize("smoothing", [1, 3, 5])
def test_monotone_runs_have_no_onset(smoothing):
    found = robust_overfitting(history(RISE), smoothing=smoothing)
    assert found.onset is None
    assert found.gap == 0
    assert "No robust overfitting" in found.advice


def test_a_dip_that_recovers_is_no_onset():
    assert robust_overfitting(history([0.3, 0.5, 0.4, 0.5, 0.5]), smoothing=1).onset is None


def test_a_fall_on_the_training_images_too_is_a_collapse():
    found = robust_overfitting(history(RISE + FALL, [0.5] * 5 + [0.1] * 5), smoothing=1)
    assert found.onset is None
    assert "catastrophic overfitting" in found.advice


def test_the_margin_follows_the_number_of_images():
    few, many = (robust_overfitting(history(RISE + [0.46] * 4), n_images=n) for n in (100, 10_000))
    assert few.onset is None
    assert many.onset is not None
    assert few.interval[0] < 0 < few.interval[1]
    assert many.interval[0] > 0
    assert few.margin == pytest.approx(2 * math.sqrt((0.25 + 0.46 * 0.54) / 100))


def test_every_onset_of_a_step_is_found():
    for n, k in itertools.product((6, 9), (2, 3, 4)):
        assert robust_overfitting(history([0.5] * k + [0.3] * (n - k)), smoothing=1).onset == k + 1


def test_verdicts_give_a_paired_bootstrap_interval():
    best = torch.tensor([True] * 60 + [False] * 40)
    last = torch.tensor([True] * 40 + [False] * 50 + [True] * 10)
    found = robust_overfitting(history(RISE + FALL), verdicts=(best, last))
    assert found.gap == pytest.approx(0.1)
    a, b = 0.2, 0.1  # shares of images that only one of the two is robust on
    deviation = math.sqrt((a + b - (a - b) ** 2) / 100)
    assert (found.interval[1] - found.interval[0]) / 2 == pytest.approx(1.96 * deviation, rel=0.1)


def test_bad_histories_are_refused():
    with pytest.raises(ValueError, match="no epoch has 'val_robust_accuracy'"):
        robust_overfitting([{"epoch": 1, "train_accuracy": 0.1}])
    with pytest.raises(ValueError, match="history must be"):
        robust_overfitting("runs/a")
    with pytest.raises(ValueError, match="same samples"):
        robust_overfitting(history(RISE), verdicts=(torch.ones(3), torch.ones(4)))
    with pytest.raises(ValueError, match="margin must lie in"):
        robust_overfitting(history(RISE), margin=-0.1)


def test_label_agreement_equals_a_slow_auroc():
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(60, 4, generator=generator)
    clean = table.argmax(1)
    labels = torch.where(torch.rand(60, generator=generator) < 0.3, torch.randint(4, (60,), generator=generator), clean)
    table[5] = 0
    found = label_agreement(table, labels, clean)
    assert math.isnan(found.agreement[5])
    wrong, score = labels != clean, found.suspicion
    kept = [i for i in range(60) if i != 5]
    pairs = [(score[i] > score[j]).double() + 0.5 * (score[i] == score[j]).double()
             for i in kept if wrong[i] for j in kept if not wrong[j]]  # fmt: skip
    assert found.auroc == pytest.approx(torch.stack(pairs).mean().item())
    assert found.agreement[0].item() == pytest.approx((table[0, labels[0]] / table[0].sum()).item())
    assert torch.equal(found.disagrees[kept], wrong[kept])
    assert "AUROC" in repr(found)


def test_label_agreement_without_noise_has_no_auroc():
    table = torch.eye(3)
    found = label_agreement(table, torch.arange(3), torch.arange(3))
    assert found.auroc is None
    assert not found.disagrees.any()


@pytest.mark.parametrize(
    ("table", "labels", "message"),
    [
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.long), "table must be"),
        (-torch.ones(3, 2), torch.zeros(3, dtype=torch.long), "negative"),
        (torch.ones(3, 2), torch.tensor([0, 1, 2]), r"labels must lie in \[0, 2\)"),
    ],
)
def test_bad_tables_are_refused(table, labels, message):
    with pytest.raises(ValueError, match=message):
        label_agreement(table, labels)
