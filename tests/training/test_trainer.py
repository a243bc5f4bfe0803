"""The training loop: determinism, exact resume, EMA, refusals, and what it leaves behind."""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import a_model, a_split, a_trainer, same, weights
from torch import nn
from torch.nn import functional as F

from at_extensions import create_model
from at_extensions.methods import PGDAT, Standard
from at_extensions.runs import RunDirectory, load_tensors
from at_extensions.training import Trainer, create_scheduler


def test_same_seed_gives_the_same_weights_bit_for_bit_and_leaves_global_randomness_alone():
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        trainer, train, val = a_trainer(3)
        trainer.fit(train, val)
        assert torch.equal(torch.get_rng_state(), before)
        results.append((weights(trainer.model), [row["train_loss"] for row in trainer.history.rows]))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_the_loop_is_the_plain_loop_over_the_method():
    trainer, train, _ = a_trainer(2, channels_last=False)
    model, plain_loader = a_model(), a_trainer(2)[1]
    method = PGDAT(model, eps=0.1, alpha=0.05, steps=2, seed=5)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = create_scheduler(opt, "onecycle", epochs=2, steps_per_epoch=len(plain_loader))
    model.train()
    for _ in range(2):
        for x, y, index in plain_loader:
            opt.zero_grad()
            F.cross_entropy(model(method.perturb(x, y, index)), y).backward()
            opt.step()
            scheduler.step()
    trainer.fit(train)
    assert same(weights(model), weights(trainer.model))


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"optimizer": "deat"}, {"clip_grad": 0.5, "precision": "bf16"}])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, options):
    whole, train, val = a_trainer(4, run_dir=tmp_path / "whole", **options)
    whole.fit(train, val)
    part, train, val = a_trainer(2, schedule_epochs=4, run_dir=tmp_path / "part", **options)
    part.fit(train, val)
    rest, train, val = a_trainer(4, run_dir=tmp_path / "part", **options)
    rest.fit(train, val)
    assert same(weights(whole.model), weights(rest.model))
    assert same(weights(whole.method.model), weights(rest.method.model))
    for kind in ("last", "best"):
        a, b = (load_tensors(RunDirectory(tmp_path / run).weights(kind))[0] for run in ("whole", "part"))
        assert same(a, b)
    timeless = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in RunDirectory(tmp_path / run).metrics()]
        for run in ("whole", "part")
    ]
    assert timeless[0] == timeless[1]
    assert [row["epoch"] for row in timeless[0]] == [1, 2, 3, 4]


def test_best_is_the_epoch_of_the_highest_validation_robust_accuracy(tmp_path):
    trainer, train, val = a_trainer(5, run_dir=tmp_path)
    history = trainer.fit(train, val)
    robust = [row["val_robust_accuracy"] for row in history.rows]
    assert history.best_epoch == 1 + robust.index(max(robust))
    again, train, val = a_trainer(history.best_epoch, schedule_epochs=5)
    again.fit(train, val)
    assert same(weights(again.model), load_tensors(RunDirectory(tmp_path).weights("best"))[0])


def test_clean_training_selects_by_clean_accuracy(tmp_path):
    trainer, train, val = a_trainer(4, method=Standard, run_dir=tmp_path)
    history = trainer.fit(train, val)
    clean = [row["val_clean_accuracy"] for row in history.rows]
    assert history.best_epoch == 1 + clean.index(max(clean))
    assert "val_robust_accuracy" not in history.rows[0]


def test_without_validation_the_last_weights_are_published(tmp_path):
    trainer, train, _ = a_trainer(2, run_dir=tmp_path)
    trainer.fit(train)
    run = RunDirectory(tmp_path)
    assert run.published_weights() == run.weights("last")
    assert same(weights(trainer.model), load_tensors(run.published_weights())[0])


def test_ema_is_the_recursion_and_is_what_is_saved(tmp_path):
    decay, model = 0.8, a_model()
    trainer, train, val = a_trainer(2, model=model, ema=decay, run_dir=tmp_path)
    mean = weights(model)
    opt_step = trainer.optimizer.step

    def step():
        opt_step()
        for key, value in model.state_dict().items():
            if value.is_floating_point() and key in dict(model.named_parameters()):
                mean[key] = decay * mean[key] + (1 - decay) * value

    trainer.optimizer.step = step
    trainer.scheduler = None
    trainer.fit(train, val)
    saved = load_tensors(RunDirectory(tmp_path).weights("last"))[0]
    for key, _ in model.named_parameters():
        torch.testing.assert_close(saved[key], mean[key])
    raw = RunDirectory(tmp_path).load_state()["model"]
    assert same(raw, weights(model))
    assert not same(raw, saved)


def test_training_leaves_modes_hooks_and_gradient_flags_as_they_were():
    model = a_model()
    frozen = model.network.features[1]
    frozen.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer, train, val = a_trainer(1, model=model)
    trainer.fit(train, val)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


class Exploding(nn.Module):
    """A model whose logits stop being finite after some training passes."""

    def __init__(self, healthy):
        super().__init__()
        self.net, self.passes, self.healthy = a_model(), 0, healthy

    def forward(self, x):
        self.passes += self.training
        return self.net(x) * (float("nan") if self.passes > self.healthy else 1.0)


def test_a_loss_that_is_not_finite_is_reported_and_costs_no_finished_epoch(tmp_path):
    model = Exploding(healthy=4)  # an epoch has three steps
    trainer, train, val = a_trainer(3, model=model, run_dir=tmp_path)
    with pytest.raises(FloatingPointError, match="learning rate"):
        trainer.fit(train, val)
    saved = load_tensors(RunDirectory(tmp_path).weights("last"))[0]
    assert all(torch.isfinite(value).all() for value in saved.values())
    assert RunDirectory(tmp_path).load_state()["epoch"] == 1


class Softmaxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = a_model()

    def forward(self, x):
        return self.net(x).softmax(1)


class Spatial(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1)

    def forward(self, x):
        return self.conv(x)


class Viewing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(108, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x.view(x.shape[0], -1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Softmaxed(), "probabilities, not logits"),
        (Spatial(), r"logits \(B, K\)"),
        (Viewing(), "channels_last=False"),
    ],
)
def test_a_model_that_returns_no_logits_is_refused_before_the_first_step(model, message):
    before = copy.deepcopy(model.state_dict())
    trainer, train, _ = a_trainer(1, model=model)
    with pytest.raises(ValueError, match=message):
        trainer.fit(train)
    assert same(before, model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 2 - 1, y), "normalisation belongs inside the model"),
        (lambda x, y: (x, y + 1), "labels must be class numbers from 0 to 2"),
        (lambda x, y: (x[0], y), r"shape \(B, C, H, W\)"),
    ],
)
def test_batches_that_cannot_be_right_are_refused(change, message):
    trainer, train, _ = a_trainer(1, channels_last=False)
    batches = [(*change(x, y), index) for x, y, index in train]
    with pytest.raises(ValueError, match=message):
        trainer.fit(batches)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"epochs": 0}, ValueError), ({"precision": "fp8"}, ValueError), ({"ema": 1.5}, ValueError),
     ({"clip_grad": -1.0}, ValueError), ({"epochs": 1.5}, TypeError)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(options, error):
    model = a_model()
    settings = {"epochs": 1} | options
    with pytest.raises(error):
        Trainer(Standard(model), torch.optim.SGD(model.parameters(), lr=0.1), **settings)


def test_a_run_is_not_overwritten_nor_mixed_with_another(tmp_path):
    trainer, train, val = a_trainer(1, run_dir=tmp_path, config={"lr": 0.1})
    trainer.fit(train, val)
    with pytest.raises(FileExistsError, match="holds a run"):
        a_trainer(1, run_dir=tmp_path, resume=False)
    with pytest.raises(ValueError, match=r"other settings \(lr: 0\.1, now 0\.2\)"):
        a_trainer(1, run_dir=tmp_path, config={"lr": 0.2})
    other = create_model("small_cnn", 3, in_chans=1, width=8)
    wrong, train, val = a_trainer(2, model=other, run_dir=tmp_path)
    with pytest.raises(ValueError, match="belongs to another model"):
        wrong.fit(train, val)


def test_a_truncated_state_is_named_and_not_used(tmp_path):
    trainer, train, val = a_trainer(1, run_dir=tmp_path)
    trainer.fit(train, val)
    path = RunDirectory(tmp_path).state_path()
    path.write_bytes(path.read_bytes()[:-200])
    resumed, train, val = a_trainer(2, run_dir=tmp_path)
    with pytest.raises(ValueError, match="truncated or foreign"):
        resumed.fit(train, val)


SCRIPT = """
import sys, torch
sys.path.insert(0, {here!r})
from tiny import a_trainer
torch.set_num_threads(1)
trainer, train, val = a_trainer(40, run_dir={run!r}, ema=0.9)
trainer.fit(train, val)
"""


def test_sigkill_at_any_moment_then_resume_gives_the_uninterrupted_weights(tmp_path):
    torch.set_num_threads(1)
    whole, train, val = a_trainer(40, run_dir=tmp_path / "whole", ema=0.9)
    whole.fit(train, val)
    run = RunDirectory(tmp_path / "killed")
    script = SCRIPT.format(here=os.path.dirname(__file__), run=str(run.path))
    for pause in (0.0, 0.13, 0.31):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
        seen = len(run.metrics())
        while len(run.metrics()) <= seen and process.poll() is None:  # let it get somewhere first
            time.sleep(0.005)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for kind in ("last", "best"):  # whatever is there is whole
            if run.weights(kind).exists():
                load_tensors(run.weights(kind))
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert same(load_tensors(run.weights("last"))[0], weights(whole.model))
    assert [row["epoch"] for row in run.metrics()] == list(range(1, 41))


def test_class_counts_that_cannot_be_right_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match=r"class_counts\[1\]"):
        a_trainer(1, class_counts=[5, 0, 3])
    trainer, train, val = a_trainer(1, class_counts=[16, 16])
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="got 2 class_counts for a model of 3 classes"):
        trainer.fit(train, val)
    assert same(weights(trainer.model), before)
    trainer, train, val = a_trainer(1, class_counts=torch.tensor([16, 16, 16]))
    assert set(trainer.fit(train, val).rows[0]["groups"]) == {"train", "val_clean", "val_robust"}


def test_a_compiled_run_trains_and_saves_what_an_uncompiled_one_does(tmp_path, monkeypatch):
    compile = torch.compile
    graphs = []

    def eager(function, **options):  # the graphs of torch.compile, without a C++ compiler
        graphs.append(options)
        return compile(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", eager)

    def with_twin(model, **options):
        return PGDAT(model, twin=True, **options)

    finals = []
    for name, compiled in (("plain", False), ("compiled", True)):
        trainer, train, val = a_trainer(2, method=with_twin, run_dir=tmp_path / name, compile=compiled)
        trainer.fit(train, val)
        finals.append(load_tensors(RunDirectory(tmp_path / name).weights("last"))[0])
    assert len(graphs) == 2  # the model's, and the twin's that attacks search on
    assert finals[0].keys() == finals[1].keys()
    for key, value in finals[0].items():
        torch.testing.assert_close(finals[1][key], value, rtol=1e-3, atol=1e-4)


def test_robust_overfitting_is_told_once_and_only_of_attacked_training(capsys, monkeypatch):
    values = iter([0.3, 0.5, 0.5, 0.4, 0.35, 0.3, 0.3, 0.3] * 2)
    monkeypatch.setattr(Trainer, "_validate", lambda self, val: {"val_robust_accuracy": next(values)})
    for method, told in ((lambda m: PGDAT(m, eps=0.1, alpha=0.1, steps=1, start="zero"), 1), (Standard, 0)):
        model = a_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        x, y = a_split().tensors()
        Trainer(method(model), optimizer, epochs=8, val_attack=False).fit([(x[:8], y[:8])], [()])
        assert capsys.readouterr().err.count("Robust overfitting since epoch 4") == told


def test_catastrophic_overfitting_is_told_apart_from_robust_overfitting(capsys, monkeypatch):
    values = iter([0.3, 0.5, 0.5, 0.02, 0.01, 0.0, 0.0])
    monkeypatch.setattr(Trainer, "_validate", lambda *_: {"val_robust_accuracy": next(values), "train_accuracy": 0.5})
    model = a_model()
    x, y = a_split().tensors()
    method = PGDAT(model, eps=0.1, alpha=0.1, steps=1, start="zero")
    trainer = Trainer(method, torch.optim.SGD(model.parameters(), lr=1e-6), epochs=7, val_attack=False)
    trainer.fit([(x[:8], y[:8])], [()])
    said = capsys.readouterr().err
    assert said.count("Catastrophic overfitting in epoch 4") == 1
    assert "Robust overfitting since" not in said
