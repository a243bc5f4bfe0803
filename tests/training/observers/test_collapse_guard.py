"""The guard catches a rigged collapse within its epoch, goes on robustly, and costs a healthy training nothing."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rigged import EPS, STEPS, Blinding, Counting, a_run, loaders, robust_accuracy
from tiny import a_trainer, same, timeless, weights

from at_extensions.attacks import NFGSM, PGD
from at_extensions.methods import FGSMAT, PGDAT, GradAlign, Standard
from at_extensions.runs import RunDirectory, load_tensors
from at_extensions.training import CollapseGuard, Observer, RollBack

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LATE = 2 * STEPS + 8  # in the third epoch
NEVER = 10**6


def events_of(history):
    return [event for row in history.rows for event in row.get("events", [])]


def rolling(**options):
    return CollapseGuard(**({"action": "rollback", "window": 6} | options))


@pytest.fixture(scope="module")
def unguarded():
    """Robust accuracy of the training that collapses, and of the one that does not."""
    found = []
    for after in (LATE, NEVER):
        trainer, train, val = a_run(None, after=after)
        trainer.fit(train, val)
        found.append(robust_accuracy(trainer.model))
    return found


def test_the_rigged_training_collapses(unguarded):
    collapsed, healthy = unguarded
    assert collapsed < 0.15
    assert healthy > 0.25


@pytest.mark.parametrize("remedy", ["n_fgsm", "more_steps"])
@pytest.mark.parametrize("sentinel", [True, False])
def test_a_collapse_is_caught_within_its_epoch_and_the_run_ends_robust(unguarded, remedy, sentinel, tmp_path):
    guard = rolling(remedy=remedy, sentinel=sentinel)
    trainer, train, val = a_run(guard, after=LATE, run_dir=tmp_path)
    history = trainer.fit(train, val)
    event = next(event for event in events_of(history) if event["event"] == "rollback")
    assert event["epoch"] == 3
    assert event["remedy"] == remedy
    assert event["single_step_accuracy"] - event["pgd_accuracy"] > 0.3
    assert event["step"] - event["back_to_step"] >= 12 or event["back_to_step"] == 0
    if sentinel:
        assert event["end_accuracy"] >= event["start_accuracy"]
        assert event["step"] <= STEPS
    assert RunDirectory(tmp_path).metrics()[2]["events"] == json.loads(json.dumps(history.rows[2]["events"]))
    assert trainer.rollbacks == 1
    assert isinstance(trainer.method.attack, NFGSM if remedy == "n_fgsm" else PGD)
    assert robust_accuracy(trainer.model) > unguarded[0] + 0.1
    assert "event" not in str([row.keys() for row in history.rows[3:]])


def test_a_collapse_that_begins_in_the_last_steps_of_an_epoch_is_caught(unguarded):
    guard = rolling()
    trainer, train, val = a_run(guard, after=3 * STEPS - 2)
    history = trainer.fit(train, val)
    first = events_of(history)[0]
    assert (first["event"], first["epoch"]) in {("rollback", 3), ("rollback", 4)}
    if first["epoch"] == 4:  # the epoch's beginning, two steps into the collapse, is as far as it goes back
        assert first["back_to_step"] == 0
        assert history.rows[2]["val_robust_accuracy"] > 0.2
    assert robust_accuracy(trainer.model) > unguarded[0] + 0.1


def test_an_epoch_that_ends_collapsed_is_not_kept():
    guard = rolling(window=1000)  # no reading within an epoch
    trainer, train, val = a_run(guard, after=2 * STEPS + 2)
    history = trainer.fit(train, val)
    event = events_of(history)[0]
    assert (event["event"], event["epoch"], event["step"], event["back_to_step"]) == ("rollback", 3, STEPS, 0)
    assert all(row["val_robust_accuracy"] > 0.2 for row in history.rows)


def test_a_second_collapse_is_answered_by_more_steps():
    guard = rolling(remedy="grad_align")  # the attack inside stays blind
    trainer, train, val = a_run(guard, after=LATE)
    history = trainer.fit(train, val)
    assert guard.applied == ["grad_align", "more_steps"]
    assert [event["remedy"] for event in events_of(history)] == guard.applied
    assert isinstance(trainer.method, GradAlign)
    assert trainer.method.attack.steps == 2


def test_a_healthy_training_is_left_alone_bit_for_bit():
    plain, train, val = a_run(None, after=NEVER)
    plain.fit(train, val)
    guard = rolling()
    watched, train, val = a_run(guard, after=NEVER)
    random_state = torch.get_rng_state()
    watched.fit(train, val)
    assert same(weights(plain.model), weights(watched.model))
    assert timeless(plain.history.rows) == timeless(watched.history.rows)
    assert watched.rollbacks == 0
    assert torch.equal(random_state, torch.get_rng_state())
    assert guard.verdict is None  # no held-out image was attacked


def test_a_warning_is_said_once_and_changes_no_bit():
    plain, train, val = a_run(None, after=LATE)
    plain.fit(train, val)
    watched, train, val = a_run(CollapseGuard(window=6), after=LATE)
    with pytest.warns(UserWarning, match="catastrophic overfitting: on 280 held-out images") as said:
        watched.fit(train, val)
    assert len([w for w in said if "catastrophic" in str(w.message)]) == 1
    assert same(weights(plain.model), weights(watched.model))
    (event,) = events_of(watched.history)
    assert (event["event"], event["epoch"], event["collapsed"]) == ("warning", 3, True)


def test_it_stops_within_the_epoch():
    trainer, train, val = a_run(CollapseGuard(action="stop", window=6), after=LATE - 6)
    history = trainer.fit(train, val)
    (event,) = events_of(history)
    assert history.stopped.startswith("catastrophic overfitting")
    assert event["event"] == "stop"
    assert event["epoch"] == len(history.rows) == 3
    assert event["step"] < STEPS


@pytest.mark.parametrize("remedy", ["n_fgsm", "grad_align"])
def test_a_run_resumed_after_a_rollback_goes_on_with_the_remedy(tmp_path, remedy):
    whole, train, val = a_run(rolling(remedy=remedy), after=LATE, epochs=5, run_dir=tmp_path / "whole")
    whole.fit(train, val)
    part, train, val = a_run(rolling(remedy=remedy), after=LATE, epochs=3, schedule_epochs=5, run_dir=tmp_path / "part")
    part.fit(train, val)
    guard = rolling(remedy=remedy)
    rest, train, val = a_run(guard, after=LATE, epochs=5, run_dir=tmp_path / "part")
    rest.fit(train, val)
    assert same(weights(whole.model), weights(rest.model))
    assert guard.applied == whole.observers[0].applied
    assert type(rest.method) is type(whole.method)
    assert rest.method.attack.attack == whole.method.attack.attack
    rows = [RunDirectory(tmp_path / name).metrics() for name in ("whole", "part")]
    assert timeless(rows[0]) == timeless(rows[1])
    assert [row.get("events") for row in rows[0]] == [row.get("events") for row in rows[1]]


def test_a_kill_between_alarm_and_recovery_changes_nothing(tmp_path):
    worker = [sys.executable, "-W", "ignore", str(HERE / "collapse_worker.py"), str(tmp_path), "grad_align"]
    codes = [subprocess.run([*worker, str(tmp_path / "mark")], env=ENVIRONMENT).returncode for _ in range(2)]
    assert codes == [-signal.SIGKILL, 0]
    whole, train, val = a_run(rolling(remedy="grad_align"), after=LATE, epochs=4)
    whole.fit(train, val)
    saved = torch.load(tmp_path / "0.pt", weights_only=True)
    assert same(load_tensors(RunDirectory(tmp_path / "run").weights("last"))[0], weights(whole.model))
    assert saved["applied"] == whole.observers[0].applied
    assert saved["robust"] > 0.25
    assert RunDirectory(tmp_path / "run").metrics()[2]["events"] == json.loads(json.dumps(events_of(whole.history)))


def test_two_processes_decide_as_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = str(HERE / "collapse_worker.py")
    done = subprocess.run([*command, worker, str(tmp_path), "n_fgsm"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(saved[0].pop("weights"), saved[1].pop("weights"))
    assert saved[0] == saved[1]
    assert saved[0]["applied"] == ["n_fgsm"]
    rows = RunDirectory(tmp_path / "run").metrics()
    event = next(event for row in rows for event in row.get("events", []) if event["event"] == "rollback")
    assert event["epoch"] == 3
    assert event["images"] == 280  # each process attacked its half
    assert rows[-1]["val_robust_accuracy"] > 0.25


def test_an_alarm_that_is_none_is_recorded_and_followed_by_growing_pauses():
    class Alarmed(CollapseGuard):
        judged = 0

        def _read(self):
            self._forget()
            return {"start_accuracy": 0.5, "end_accuracy": 0.5}

        def _judge(self, model):
            self.judged += 1
            return super()._judge(model)

    guard = Alarmed(action="rollback", window=1)
    trainer, train, val = a_run(guard, after=NEVER, epochs=2, val_attack=lambda m: PGD(m, EPS, EPS / 4, 10))
    history = trainer.fit(train, val)
    steps = [[event["step"] for event in row["events"]] for row in history.rows]
    assert steps == [[1, 3, 6, 11], [2, 11]]  # pauses of 1, 2, 4, 8, 8 readings
    assert {event["event"] for event in events_of(history)} == {"alarm"}
    assert guard.judged == len(events_of(history))
    assert trainer.rollbacks == 0


@pytest.mark.parametrize("variant", ["rs", "plain"])
def test_the_step_size_is_halved(variant):
    guard = CollapseGuard(torch.rand(4, 1, 8, 8), torch.arange(4), action="rollback", remedy="lower_alpha")
    trainer, _, _ = a_run(guard, after=NEVER, method=lambda model: FGSMAT(model, eps=EPS, variant=variant))
    guard.begin(trainer)
    guard._treat(trainer)
    assert trainer.method.attack.alpha == pytest.approx({"rs": 1.25 * EPS / 2, "plain": EPS / 2}[variant])
    x = torch.full((5, 1, 8, 8), 0.5)
    reach = (trainer.method.perturb(x, torch.arange(5)) - x).abs().max()
    assert reach <= (EPS if variant == "rs" else EPS / 2) + 1e-6


def test_a_function_is_a_remedy_and_is_repeated_on_resume(tmp_path):
    def shrink(trainer):
        trainer.method.attack = PGD(trainer.method.model, EPS, EPS / 2, 3)

    whole, train, val = a_run(rolling(remedy=shrink), after=LATE, epochs=3, schedule_epochs=5, run_dir=tmp_path)
    assert events_of(whole.fit(train, val))[0]["remedy"] == "shrink"
    rest, train, val = a_run(rolling(remedy=shrink), after=LATE, epochs=4, schedule_epochs=5, run_dir=tmp_path)
    rest.fit(train, val)
    assert rest.method.attack.steps == 3


def test_it_works_in_a_loop_of_ones_own(untouched):
    model = Counting()
    method = FGSMAT(model, attack=Blinding(model, EPS, LATE), seed=3)
    train, val = loaders()
    images, labels = next(iter(val))[:2]
    guard = CollapseGuard(images, labels, action="rollback")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    found = None
    for number in range(1, 5 * STEPS + 1):
        if number % STEPS == 1:
            batches = iter(train)
        x, y, *_ = next(batches)
        step = method(x, y)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        guard.watch(method, step, y)
        if number % 6 == 0:
            with untouched(model):
                found = guard.check(model)
            if found:
                break
    assert isinstance(found, RollBack)
    assert LATE <= number <= LATE + 20
    assert found.evidence["end_accuracy"] >= found.evidence["start_accuracy"]
    assert guard.verdict.collapsed
    assert "under PGD" in found.reason


def test_without_sentinel_every_check_in_a_loop_of_ones_own_attacks():
    model = Counting()
    method = PGDAT(model, eps=EPS, steps=2)
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    guard = CollapseGuard(x, y, action="stop")
    guard.watch(method, method(x, y), y)
    assert guard.check(model) is None
    assert guard.verdict.images == 8


def test_a_steep_fall_of_robust_accuracy_is_a_collapse_and_a_small_one_is_noise(monkeypatch):
    found = iter([(0.5, 0.45, 0.4), (0.5, 0.3, 0.21), (0.5, 0.3, 0.19), (0.9, 0.5, 0.19), (0.5, 0.06, 0.02)])
    monkeypatch.setattr(
        "at_extensions.training.observers.collapse_guard.count_right", lambda *_: (list(next(found)), 512)
    )
    guard = CollapseGuard(torch.rand(512, 1, 1, 1), torch.zeros(512, dtype=torch.long))
    monkeypatch.setattr(guard, "_attacks", lambda model: ())
    assert [guard._judge(None).collapsed for _ in range(4)] == [False, False, True, True]
    guard._best = 0.02
    assert not guard._judge(None).collapsed


def test_bad_guards_are_refused():
    with pytest.raises(ValueError, match="unknown action"):
        CollapseGuard(action="pray")
    with pytest.raises(ValueError, match="unknown remedy"):
        CollapseGuard(remedy="hope")
    with pytest.raises(ValueError, match="together"):
        CollapseGuard(torch.rand(4, 1, 8, 8))
    with pytest.raises(ValueError, match="window"):
        CollapseGuard(window=0)
    with pytest.raises(ValueError, match="gap"):
        CollapseGuard(gap=1.5)
    trainer, train, _ = a_run(CollapseGuard(), after=NEVER)
    with pytest.raises(ValueError, match="needs held-out images"):
        trainer.fit(train)
    trainer, train, val = a_trainer(1, method=Standard, observers=[CollapseGuard()])
    with pytest.raises(ValueError, match="no attack"):
        trainer.fit(train, val)


def test_held_out_images_are_the_first_of_the_validation_batches_and_bounded():
    guard = CollapseGuard(images=100)
    trainer, train, val = a_run(guard, after=NEVER, epochs=1)
    trainer.fit(train, val)
    assert torch.equal(guard._held_out[0], next(iter(val))[0][:100])


def test_another_observers_rollback_takes_the_guard_back():
    class Once(Observer):
        rolls_back, check_every = True, 4
        done = False

        def check(self, model):
            if self.done:
                return None
            self.done = True
            return RollBack("once more")

    plain, train, val = a_run(rolling(), after=LATE)
    plain.fit(train, val)
    guard = rolling()
    twice, train, val = a_run(guard, after=LATE)
    twice.observers.append(Once())
    twice.fit(train, val)
    assert same(weights(plain.model), weights(twice.model))
    assert guard.applied == ["n_fgsm"]


def test_with_an_average_the_raw_model_is_watched():
    guard = rolling()
    trainer, train, val = a_run(guard, after=LATE, ema=0.99)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = trainer.fit(train, val)
    assert events_of(history)[0]["epoch"] == 3
    assert robust_accuracy(trainer.method.model) > 0.25


def test_stop_is_asked_for_once():
    guard = CollapseGuard(action="stop", sentinel=False)
    trainer, train, val = a_run(guard, after=LATE - 6)
    history = trainer.fit(train, val)
    assert [event["event"] for event in events_of(history)] == ["stop"]
