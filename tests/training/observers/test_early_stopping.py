"""Early stopping counts epochs without improvement, ends a run and resumes where it was."""

import copy

import pytest
from tiny import a_trainer

from at_extensions.training import EarlyStopping, Observer


def robust(*values):
    return [{"epoch": i + 1, "val_robust_accuracy": v} for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "options", "stops_at"),
    [
        ([0.1, 0.2, 0.3, 0.4], {"patience": 1}, None),
        ([0.3, 0.2, 0.25, 0.28], {"patience": 2}, 3),
        ([0.3, 0.2, 0.31, 0.3, 0.3], {"patience": 2}, 5),
        ([0.3, 0.305, 0.31, 0.315], {"patience": 3, "min_delta": 0.1}, 4),
        ([0.3, 0.3], {"patience": 1}, 2),
        ([3.0, 2.0, 2.5, 1.9], {"patience": 2, "mode": "min"}, None),
        ([3.0, 3.0, 3.5], {"patience": 2, "mode": "min"}, 3),
    ],
)
def test_early_stopping_counts_epochs_without_improvement(values, options, stops_at):
    observer = EarlyStopping(**options)
    for row in robust(*values):
        again = EarlyStopping(**options)
        again.load_state_dict(copy.deepcopy(observer.state_dict()))
        observer = again
        request = observer.after_epoch(row["epoch"], None, row)
        assert (request is not None) == (row["epoch"] == stops_at)
        if request:
            break
    if stops_at:
        assert request.evidence["value"] == values[stops_at - 1]
        assert str(request.evidence["best_epoch"]) in request.reason


def test_early_stopping_ends_a_run_and_keeps_its_best_epoch(tmp_path):
    trainer, train, val = a_trainer(30, lr=1e-6, run_dir=tmp_path, observers=[EarlyStopping(patience=2)])
    history = trainer.fit(train, val)
    assert len(history.rows) < 30
    best = max(row["val_robust_accuracy"] for row in history.rows)
    assert history.rows[history.best_epoch - 1]["val_robust_accuracy"] == best
    assert "val_robust_accuracy has not improved" in history.stopped


def test_early_stopping_resumes_where_it_was(tmp_path):
    class Falling(Observer):
        def after_epoch(self, epoch, model, row):
            return {"m": -float(epoch)}

    def observers():
        return [Falling(), EarlyStopping("m", patience=3)]

    part, train, val = a_trainer(2, schedule_epochs=9, run_dir=tmp_path, observers=observers())
    part.fit(train, val)
    rest, train, val = a_trainer(9, run_dir=tmp_path, observers=observers())
    assert len(rest.fit(train, val).rows) == 4
