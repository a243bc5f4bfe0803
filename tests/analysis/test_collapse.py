"""Catastrophic overfitting is read off a history, apart from robust overfitting and failed trainings."""

import json

import pytest

from at_extensions.analysis import catastrophic_overfitting, robust_overfitting


def rows(robust, train=None, events=None):
    train = [None] * len(robust) if train is None else train
    made = [
        {"epoch": i + 1, "val_robust_accuracy": r} | ({} if t is None else {"train_accuracy": t})
        for i, (r, t) in enumerate(zip(robust, train))
    ]
    for number, event in (events or {}).items():
        made[number - 1]["events"] = [event]
    return made


CASES = {  # robust accuracy, training accuracy, onset, sign
    "fell to nothing": ([0.3, 0.38, 0.4, 0.02, 0.0], [0.3, 0.36, 0.4, 0.7, 0.9], 4, "fall"),
    "training unknown": ([0.3, 0.38, 0.4, 0.02, 0.0], None, 4, "fall"),
    "in the second epoch": ([0.3, 0.1], [0.3, 0.5], 2, "fall"),
    "a gap that opens at once": ([0.3, 0.38, 0.4, 0.28], [0.3, 0.36, 0.4, 0.6], 4, "gap"),
    "healthy": ([0.3, 0.38, 0.4, 0.42], [0.3, 0.36, 0.4, 0.45], None, None),
    "robust overfitting": ([0.4, 0.53, 0.52, 0.5, 0.47, 0.45], [0.4, 0.6, 0.7, 0.8, 0.9, 0.93], None, None),
    "a failed training": ([0.3, 0.4, 0.1, 0.1], [0.3, 0.4, 0.1, 0.1], None, None),
    "noise near nothing": ([0.05, 0.02, 0.06], [0.1, 0.1, 0.11], None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_onset_and_its_sign_are_found(case):
    robust, train, onset, sign = CASES[case]
    found = catastrophic_overfitting(rows(robust, train))
    assert (found.onset, found.sign) == (onset, sign)
    assert found.collapsed == (onset is not None)
    assert json.loads(json.dumps(found.to_dict()))["onset"] == onset
    assert ("none" in repr(found).splitlines()[0]) == (onset is None)
    if onset:
        assert found.robust_at_onset == robust[onset - 1]
        assert f"in epoch {onset}" in found.advice
        assert found.recovered is False


def test_robust_overfitting_is_told_apart():
    robust, train, *_ = CASES["robust overfitting"]
    assert robust_overfitting(rows(robust, train)).overfits
    assert not catastrophic_overfitting(rows(robust, train)).collapsed


def test_a_recovery_is_seen():
    found = catastrophic_overfitting(rows([0.3, 0.4, 0.01, 0.38], [0.3, 0.4, 0.8, 0.4]))
    assert (found.onset, found.recovered) == (3, True)


def test_a_guards_events_are_kept_and_named():
    event = {"event": "rollback", "observer": "CollapseGuard", "epoch": 3, "remedy": "n_fgsm"}
    other = {"event": "stop", "observer": "EarlyStopping", "epoch": 4}
    found = catastrophic_overfitting(rows([0.3, 0.4, 0.41, 0.42], None, {3: event, 4: other}))
    assert found.events == [event]
    assert "rolled back (n_fgsm)" in found.advice
    assert "epoch 3: rollback" in repr(found)


def test_a_history_without_the_metric_is_refused():
    with pytest.raises(ValueError, match="no epoch has"):
        catastrophic_overfitting([{"epoch": 1, "train_accuracy": 0.5}])
    with pytest.raises(ValueError, match="one mapping an epoch"):
        catastrophic_overfitting(3)
    with pytest.raises(ValueError, match="fall"):
        catastrophic_overfitting(rows([0.3]), fall=2)
