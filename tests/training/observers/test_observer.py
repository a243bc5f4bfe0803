"""Observers see epochs and steps, stop a run or roll it back, exactly and under resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import a_split, a_trainer, same, timeless, weights

from at_extensions.attacks import PGD
from at_extensions.data import make_loader
from at_extensions.methods import Wrapping
from at_extensions.runs import RunDirectory, load_tensors
from at_extensions.training import EarlyStopping, Observer, RollBack, Stop

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Recording(Observer):
    """Notes every call."""

    def __init__(self):
        self.epochs, self.steps, self.began = [], [], 0

    def begin(self, trainer):
        self.began += 1

    def after_step(self, number, step, y):
        self.steps.append((number, len(y)))

    def after_epoch(self, epoch, model, row):
        self.epochs.append((epoch, id(model), dict(row)))
        return {"seen": epoch * 10}


class Adding(Observer):
    """Adds to the row what an earlier observer left there."""

    def after_epoch(self, epoch, model, row):
        return {"doubled": row["seen"] * 2}


def test_observers_see_steps_and_epochs_and_add_to_rows(tmp_path):
    recording = Recording()
    trainer, train, val = a_trainer(2, run_dir=tmp_path, observers=[recording, Adding()], ema=0.9)
    trainer.fit(train, val)
    assert recording.steps == [(1, 16), (2, 16), (3, 16)] * 2
    assert [epoch for epoch, _, _ in recording.epochs] == [1, 2]
    assert {model for _, model, _ in recording.epochs} == {id(trainer.ema.module)}
    assert "val_robust_accuracy" in recording.epochs[0][2]
    rows = RunDirectory(tmp_path).metrics()
    assert [(row["seen"], row["doubled"]) for row in rows] == [(10, 20), (20, 40)]
    assert recording.began == 1


def test_observers_that_ask_for_nothing_change_no_bit():
    plain, train, val = a_trainer(2)
    plain.fit(train, val)
    watched, train, val = a_trainer(2, observers=[Recording(), Rolling(never=True)])
    watched.fit(train, val)
    assert same(weights(plain.model), weights(watched.model))


class StopsAt(Observer):
    """Asks to stop after an epoch, or within it."""

    def __init__(self, epoch, check_every=None):
        self.at, self.check_every, self.epoch = epoch, check_every, 1

    def after_epoch(self, epoch, model, row):
        self.epoch = epoch + 1
        return Stop("enough", {"value": 3.5}) if epoch == self.at and not self.check_every else None

    def check(self, model):
        return Stop("enough within") if self.epoch == self.at else None


def test_a_stop_ends_the_run_after_its_epoch_and_is_recorded(tmp_path):
    trainer, train, val = a_trainer(5, run_dir=tmp_path, observers=[StopsAt(2)])
    history = trainer.fit(train, val)
    assert history.stopped == "enough"
    rows = RunDirectory(tmp_path).metrics()
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["events"] == [
        {"event": "stop", "observer": "StopsAt", "epoch": 2, "step": 3, "reason": "enough", "value": 3.5}
    ]
    again, train, val = a_trainer(5, run_dir=tmp_path, observers=[StopsAt(2)])
    assert again.fit(train, val).rows == rows  # a stopped run stays stopped
    assert same(weights(again.model), weights(trainer.model))


def test_a_stop_within_an_epoch_ends_the_epoch_there():
    recording = Recording()
    trainer, train, val = a_trainer(4, observers=[recording, StopsAt(2, check_every=2)])
    trainer.fit(train, val)
    assert [number for number, _ in recording.steps] == [1, 2, 3, 1, 2]
    assert len(trainer.history.rows) == 2
    assert trainer.history.rows[1]["events"][0]["step"] == 2


class Rolling(Observer):
    """Rolls back once, at a step or at the end of an epoch, with a remedy."""

    rolls_back = True

    def __init__(self, *, at_step=None, at_epoch=2, steps=None, remedy=None, never=False, times=1, snapshot_every=None):
        self.at_step, self.at_epoch, self.steps, self.remedy, self.never = at_step, at_epoch, steps, remedy, never
        self.check_every = at_step
        self.snapshot_every, self.times = snapshot_every, times
        self.done, self.epoch, self.remedied, self.trainer = 0, 1, False, None

    def begin(self, trainer):
        self.trainer = trainer

    def _ask(self):
        if self.never or self.done >= self.times:
            return None
        self.done += 1
        return RollBack("collapsed", self.steps, self._cure if self.remedy else None, {"robust": 0.01})

    def _cure(self, trainer):
        self.remedied = True
        self.remedy(trainer)

    def check(self, model):
        return self._ask() if self.epoch == self.at_epoch else None

    def after_epoch(self, epoch, model, row):
        answer = self._ask() if self.at_step is None and epoch == self.at_epoch else None
        if answer is None:
            self.epoch = epoch + 1
        return answer

    def state_dict(self):
        return {"done": self.done, "epoch": self.epoch, "remedied": self.remedied}

    def load_state_dict(self, state):
        self.done, self.epoch = state["done"], state["epoch"]
        if state["remedied"] and not self.remedied:
            self._cure(self.trainer)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"optimizer": "deat"}])
@pytest.mark.parametrize(
    "rolling",
    [{"at_epoch": 1}, {"at_epoch": 2}, {"at_epoch": 2, "at_step": 2}, {"at_epoch": 3, "at_step": 3, "snapshot_every": 1,
     "steps": 1}, {"at_epoch": 2, "times": 3}],
)  # fmt: skip
def test_a_rollback_without_remedy_repeats_the_same_steps(rolling, options):
    plain, train, val = a_trainer(3, **options)
    plain.fit(train, val)
    rolled, train, val = a_trainer(3, observers=[Rolling(**rolling)], **options)
    rolled.fit(train, val)
    assert rolled.rollbacks == rolling.get("times", 1)
    assert same(weights(plain.model), weights(rolled.model))
    assert timeless(plain.history.rows) == timeless(rolled.history.rows)
    assert rolled.scheduler.state_dict()["last_epoch"] == plain.scheduler.state_dict()["last_epoch"]


def test_a_rollback_goes_back_to_the_newest_snapshot_that_is_old_enough(tmp_path):
    for steps, expected in ((0, 3), (1, 2), (2, 1), (9, 0), (None, 0)):
        rolling = Rolling(at_epoch=2, at_step=3, steps=steps, snapshot_every=1)
        rolling.snapshots = 3
        recording = Recording()
        trainer, train, val = a_trainer(2, observers=[rolling, recording], run_dir=tmp_path / str(steps))
        trainer.fit(train, val)
        event = RunDirectory(tmp_path / str(steps)).metrics()[1]["events"][0]
        assert event == {"event": "rollback", "observer": "Rolling", "epoch": 2, "step": 3, "reason": "collapsed",
                         "robust": 0.01, "back_to_step": expected}  # fmt: skip
        assert [number for number, _ in recording.steps[3:]] == [1, 2, 3, *range(expected + 1, 4)]


def assert_same_memory(a, b):
    a, b = a.memory(), b.memory()
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items() if isinstance(value, torch.Tensor))


def weaker(trainer):
    trainer.method.attack = PGD(trainer.method.model, 0.02, 0.02, 1)


def test_a_remedy_acts_from_the_snapshot_on():
    rolled, train, val = a_trainer(3, observers=[Rolling(at_epoch=2, remedy=weaker)])
    rolled.fit(train, val)
    by_hand, train, val = a_trainer(1, schedule_epochs=3)
    by_hand.fit(train, val)
    weaker(by_hand)
    by_hand.epochs = 3
    by_hand.fit(train, val)
    assert same(weights(rolled.model), weights(by_hand.model))
    plain, train, val = a_trainer(3)
    plain.fit(train, val)
    assert not same(weights(rolled.model), weights(plain.model))


def wrapped_in_penalty(trainer):
    trainer.method = Doubled(trainer.method)


class Doubled(Wrapping):
    """A method with a buffer more than the one inside."""

    def __init__(self, inner):
        super().__init__(inner)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def loss(self, x, x_adv, y, index=None):
        self.steps += 1
        step = self.inner.loss(x, x_adv, y, index)
        return step.plus("extra", step.loss)


@pytest.mark.parametrize("remedy", [weaker, wrapped_in_penalty])
def test_a_run_that_was_rolled_back_resumes_with_its_remedy(tmp_path, remedy):
    whole, train, val = a_trainer(4, run_dir=tmp_path / "whole", observers=[Rolling(at_epoch=2, remedy=remedy)])
    whole.fit(train, val)
    part, train, val = a_trainer(
        2, schedule_epochs=4, run_dir=tmp_path / "part", observers=[Rolling(at_epoch=2, remedy=remedy)]
    )
    part.fit(train, val)
    rest, train, val = a_trainer(4, run_dir=tmp_path / "part", observers=[Rolling(at_epoch=2, remedy=remedy)])
    rest.fit(train, val)
    assert same(weights(whole.model), weights(rest.model))
    assert type(rest.method) is type(whole.method)
    assert_same_memory(whole.method, rest.method)
    rows = [timeless(RunDirectory(tmp_path / name).metrics()) for name in ("whole", "part")]
    assert rows[0] == rows[1]
    assert rest.rollbacks == 1
    if remedy is wrapped_in_penalty:
        assert "train_extra" in rest.history.rows[1]
        assert "train_extra" not in rest.history.rows[0]


def test_rollbacks_are_bounded(tmp_path):
    trainer, train, val = a_trainer(4, run_dir=tmp_path, observers=[Rolling(at_epoch=2, times=99)], max_rollbacks=2)
    history = trainer.fit(train, val)
    assert trainer.rollbacks == 2
    assert history.stopped == "rolled back 2 times already: collapsed"
    assert [event["event"] for event in history.rows[-1]["events"]] == ["rollback", "rollback", "stop"]
    one, train, val = a_trainer(1, schedule_epochs=4)
    one.fit(train, val)
    assert same(weights(trainer.model), weights(one.model))
    assert same(load_tensors(RunDirectory(tmp_path).weights("last"))[0], weights(one.model))
    first, train, val = a_trainer(4, observers=[Rolling(at_epoch=1, times=99)], max_rollbacks=0)
    with pytest.raises(RuntimeError, match="first epoch was rolled back 0 times"):
        first.fit(train, val)


def test_a_rollback_that_was_not_announced_is_an_error():
    class Careless(Rolling):
        rolls_back = False

    trainer, train, val = a_trainer(3, observers=[Careless(at_epoch=1)])
    with pytest.raises(RuntimeError, match=r"Careless\.rolls_back = True"):
        trainer.fit(train, val)


def test_another_observers_memory_goes_back_too():
    class Counting(Observer):
        def __init__(self):
            self.steps = 0

        def after_step(self, number, step, y):
            self.steps += 1

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    counting = Counting()
    trainer, train, val = a_trainer(3, observers=[counting, Rolling(at_epoch=2)])
    trainer.fit(train, val)
    assert counting.steps == 9


SCRIPT = """
import os, signal, sys, torch
sys.path[:0] = [{here!r}, {above!r}]
torch.set_num_threads(1)
from test_observer import Rolling, weaker
from tiny import a_trainer

class Killed(Rolling):
    def _cure(self, trainer):
        if not os.path.exists({mark!r}):
            open({mark!r}, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)  # between the alarm and the recovery
        super()._cure(trainer)

Killed.__name__ = "Rolling"
trainer, train, val = a_trainer(3, run_dir={run!r}, observers=[Killed(at_epoch=2, at_step=2, remedy=weaker)])
trainer.fit(train, val)
"""


def test_a_kill_between_alarm_and_recovery_changes_nothing(tmp_path):
    whole, train, val = a_trainer(3, observers=[Rolling(at_epoch=2, at_step=2, remedy=weaker)])
    whole.fit(train, val)
    run = RunDirectory(tmp_path / "run")
    script = SCRIPT.format(here=str(HERE), above=str(HERE.parent), mark=str(tmp_path / "mark"), run=str(run.path))
    codes = [
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=ENVIRONMENT).returncode for _ in range(2)
    ]
    assert codes == [-signal.SIGKILL, 0]
    assert same(load_tensors(run.weights("last"))[0], weights(whole.model))
    assert timeless(run.metrics()) == json.loads(json.dumps(timeless(whole.history.rows)))


def test_two_processes_roll_back_together_and_disagreement_is_an_error(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / "observers_worker.py"), str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for one, two in zip(saved[0]["weights"].values(), saved[1]["weights"].values()):
        assert torch.equal(one, two)
    for rank in saved:
        assert rank["rollbacks"] == 1
        assert rank["seed"] == 5
        assert rank["attack"] == 0.02
        assert "ask for different things" in rank["said"]
    assert RunDirectory(tmp_path / "run").metrics()[1]["events"][0]["event"] == "rollback"
    one, train, val = a_trainer(3, run_dir=tmp_path / "run", observers=[Rolling(at_epoch=2, remedy=weaker)])
    with pytest.raises(ValueError, match="saved by 2 processes and is resumed by 1"):
        one.fit(train, val)


def test_bad_observers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="patience must be at least 1"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="unknown mode"):
        EarlyStopping(mode="maximum")
    with pytest.raises(TypeError, match="observers must be"):
        a_trainer(1, observers=[lambda: None])
    trainer, train, _ = a_trainer(2, observers=[EarlyStopping()])
    with pytest.raises(ValueError, match=r"'val_robust_accuracy', which the epoch's row has not; it has .*train_loss"):
        trainer.fit(train)
    trainer, train, val = a_trainer(1, run_dir=tmp_path)
    trainer.fit(train, val)
    other, train, val = a_trainer(2, run_dir=tmp_path, observers=[EarlyStopping()])
    with pytest.raises(ValueError, match=r"the run had the observers \[\], this trainer has \['EarlyStopping'\]"):
        other.fit(train, val)


def test_a_loader_without_a_state_is_rolled_back_by_skipping_batches():
    batches = list(make_loader(a_split(), 16))
    plain, _, val = a_trainer(2)
    plain.fit(batches, val)
    rolled, _, val = a_trainer(2, observers=[Rolling(at_epoch=2, at_step=3, steps=1, snapshot_every=1)])
    rolled.fit(batches, val)
    assert rolled.rollbacks == 1
    assert same(weights(plain.model), weights(rolled.model))
