"""Kept epochs: each holds the published weights of its epoch, and no kill loses or leaves a wrong one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import a_model, a_trainer, same, weights

from at_extensions import load_model
from at_extensions.commands.train import train as train_run
from at_extensions.runs import RunDirectory, load_tensors
from at_extensions.training.observers import Observer

HERE = Path(__file__).parent
SCRIPT = """
import sys, torch
sys.path.insert(0, {here!r})
from tiny import a_trainer
torch.set_num_threads(1)
trainer, train, val = a_trainer(30, run_dir={run!r}, ema=0.9, keep_every=1)
trainer.fit(train, val)
"""


class Recorder(Observer):
    """Copies the published weights after each epoch."""

    def __init__(self):
        self.seen = {}

    def after_epoch(self, epoch, model, row):
        self.seen[epoch] = weights(model)


def kept(run):
    return {epoch: load_tensors(path)[0] for epoch, path in RunDirectory(run).kept().items()}


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}])
def test_every_second_epoch_is_kept_as_it_was_published(tmp_path, options):
    recorder = Recorder()
    trainer, train, val = a_trainer(5, run_dir=tmp_path, keep_every=2, observers=[recorder], **options)
    trainer.fit(train, val)
    found = kept(tmp_path)
    assert list(found) == [2, 4]
    assert all(same(found[epoch], recorder.seen[epoch]) for epoch in found)
    assert not same(found[2], found[4])
    x = torch.rand(5, 1, 8, 8)
    model = a_model().eval()
    model.load_state_dict(recorder.seen[4])
    assert torch.equal(load_model(RunDirectory(tmp_path).kept()[4])(x), model(x))


def test_nothing_is_kept_unless_asked(tmp_path):
    trainer, train, val = a_trainer(2, run_dir=tmp_path)
    trainer.fit(train, val)
    assert RunDirectory(tmp_path).kept() == {}


def test_keeping_needs_a_run_directory_and_a_count():
    with pytest.raises(ValueError, match="give run_dir too"):
        a_trainer(2, keep_every=1)
    with pytest.raises(ValueError, match="keep_every"):
        a_trainer(2, keep_every=0)


def test_interrupted_and_resumed_keeps_the_same_files(tmp_path):
    whole, train, val = a_trainer(4, run_dir=tmp_path / "whole", keep_every=1)
    whole.fit(train, val)
    part, train, val = a_trainer(2, schedule_epochs=4, run_dir=tmp_path / "part", keep_every=1)
    part.fit(train, val)
    cut_short = RunDirectory(tmp_path / "part").kept_path(3)
    cut_short.write_bytes(b"of an epoch that was cut short")
    rest, train, val = a_trainer(4, run_dir=tmp_path / "part", keep_every=1)
    rest.fit(train, val)
    a, b = kept(tmp_path / "whole"), kept(tmp_path / "part")
    assert list(a) == list(b) == [1, 2, 3, 4]
    assert all(same(a[epoch], b[epoch]) for epoch in a)


def test_weights_of_an_epoch_that_was_cut_short_do_not_stay(tmp_path):
    trainer, train, val = a_trainer(2, run_dir=tmp_path, keep_every=1)
    trainer.fit(train, val)
    run = RunDirectory(tmp_path)
    run.kept_path(3).write_bytes(run.kept_path(2).read_bytes())
    trainer, train, val = a_trainer(2, run_dir=tmp_path, keep_every=1)
    trainer.fit(train, val)
    assert list(run.kept()) == [1, 2]


def test_damaged_kept_weights_are_mended_or_named(tmp_path):
    trainer, train, val = a_trainer(2, run_dir=tmp_path, keep_every=1)
    trainer.fit(train, val)
    run, before = RunDirectory(tmp_path), kept(tmp_path)
    for path in run.kept().values():
        content = path.read_bytes()
        path.unlink()  # epoch 2 shares its file with the last weights
        path.write_bytes(content[:-9])
    trainer, train, val = a_trainer(2, run_dir=tmp_path, keep_every=1)
    with pytest.warns(UserWarning, match="epoch-000") as told:
        trainer.fit(train, val)
    messages = sorted(str(warning.message) for warning in told)
    assert "epoch-0001.safetensors is damaged, and cannot be written anew" in messages[0]
    assert "epoch-0002.safetensors was missing or damaged; it is written anew" in messages[1]
    assert same(load_tensors(run.kept_path(2))[0], before[2])


def test_a_run_begun_anew_discards_what_an_earlier_one_kept(tmp_path):
    trainer, train, val = a_trainer(2, run_dir=tmp_path, keep_every=1)
    trainer.fit(train, val)
    run = RunDirectory(tmp_path)
    run.state_path().unlink()
    trainer, train, val = a_trainer(2, run_dir=tmp_path, keep_every=2, lr=0.05)
    trainer.fit(train, val)
    found = kept(tmp_path)
    assert list(found) == [2]
    assert same(found[2], weights(trainer.model))


def test_sigkill_at_any_moment_then_resume_keeps_the_uninterrupted_files(tmp_path):
    torch.set_num_threads(1)
    whole, train, val = a_trainer(30, run_dir=tmp_path / "whole", ema=0.9, keep_every=1)
    whole.fit(train, val)
    run = RunDirectory(tmp_path / "killed")
    script = SCRIPT.format(here=str(HERE), run=str(run.path))
    for pause in (0.0, 0.11, 0.23):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
        seen, end = len(run.metrics()), time.monotonic() + 100
        while len(run.metrics()) <= seen and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept(run.path)  # whatever is there is whole
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    a, b = kept(tmp_path / "whole"), kept(run.path)
    assert list(a) == list(b) == list(range(1, 31))
    assert all(same(a[epoch], b[epoch]) for epoch in a)


def test_the_setting_is_recorded_and_runs_without_it_resume(tmp_path):
    options = {"data": "digits", "epochs": 1, "train_size": 40, "batch_size": 20, "val_steps": 1, "method": "n_fgsm"}
    run = train_run(tmp_path / "run", progress=False, keep_every=1, **options)
    assert run.config()["training"]["keep_every"] == 1
    assert list(run.kept()) == [1]
    old = train_run(tmp_path / "old", progress=False, **options)
    config = old.config()
    del config["training"]["keep_every"]
    old.write_config(config)
    assert train_run(old.path, progress=False, **options).metrics() == old.metrics()
    with pytest.raises(ValueError, match=r"training.keep_every: none, now 1"):
        train_run(old.path, progress=False, keep_every=1, **options)
