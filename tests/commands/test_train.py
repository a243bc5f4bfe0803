"""A whole run from plain settings."""

from importlib import import_module

import numpy as np
import pytest
import torch

from at_extensions.commands.evaluate import evaluate_run
from at_extensions.commands.train import load_splits, train
from at_extensions.data import Injection, carriers, inject, load_dataset
from at_extensions.methods import list_methods, method_options
from at_extensions.models import load_model
from at_extensions.runs import load_tensors
from at_extensions.settings import TrainSettings

QUICK = {"data": "digits", "epochs": 1, "model_options": {"width": 4}, "augment": "crop", "eps": 0.2, "progress": False}


@pytest.mark.parametrize("method", ["standard", "pgd", "fgsm", "rs_fgsm", "n_fgsm"])
def test_every_method_trains_on_real_digits_and_its_checkpoint_rebuilds(tmp_path, method):
    run = train(tmp_path / "run", method=method, steps=1 if method == "pgd" else None, **QUICK)
    row = run.metrics()[-1]
    assert row["epoch"] == 1
    assert 0 <= row["val_robust_accuracy"] <= row["val_clean_accuracy"] <= 1
    config = run.config()
    assert config["method"]["name"] == method
    assert config["model"]["in_chans"] == 1
    assert config["versions"]["torch"]
    model = load_model(run.published_weights())
    saved = load_tensors(run.published_weights())[0]
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_the_seed_decides_everything(tmp_path):
    def final(seed, name):
        return load_tensors(train(tmp_path / name, seed=seed, **QUICK).weights("last"))[0]

    torch.manual_seed(1)
    a = final(0, "a")
    torch.manual_seed(2)
    b, c = final(0, "b"), final(1, "c")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_the_radius_may_be_a_fraction_and_options_reach_the_method(tmp_path):
    run = train(
        tmp_path / "run",
        **(QUICK | {"eps": "51/255", "method": "n_fgsm", "alpha": "1/10", "method_options": {"k": 1.0}}),
    )
    assert run.config()["method"]["eps"] == pytest.approx(0.2)
    assert run.config()["method"]["method_options"] == {"k": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, "did you mean 8/255"),
        ({"eps": "eight"}, "such as 8/255"),
        ({"model": "preactresnet"}, "preact_resnet18"),
        ({"method": "pgdd"}, "did you mean 'pgd'"),
        ({"data": "cifar"}, "cifar10"),
        ({"method": "n_fgsm", "steps": 3}, "unknown option of method 'n_fgsm' 'steps'"),
        ({"optimizer": "adam"}, "adamw"),
        ({"method_options": {"stert": "zero"}}, "did you mean 'start'"),
        ({"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_settings_that_cannot_be_right_are_named_and_leave_no_run(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **(QUICK | settings))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("method", list_methods())
def test_deat_drives_every_method(tmp_path, method):
    steps = 1 if "steps" in method_options(method) else None
    options = QUICK | {"method": method, "imbalance_ratio": 0.3, "steps": steps}
    run = train(tmp_path / "run", optimizer="deat", optimizer_options={"k1": 0.5}, lr=0.05, **options)
    assert run.config()["training"]["optimizer_options"] == {"k1": 0.5}
    before = train(tmp_path / "other", optimizer="deat", lr=0.05, **options)
    a, b = (load_tensors(r.weights("last"))[0] for r in (run, before))
    assert not all(torch.equal(a[key], b[key]) for key in a)  # k1 reached it


def test_an_option_that_the_optimiser_lacks_is_refused(tmp_path):
    with pytest.raises(TypeError, match="k3"):
        train(tmp_path / "run", optimizer="deat", optimizer_options={"k3": 0.5}, **QUICK)


def test_data_that_are_long_tailed_by_themselves_are_measured_by_group(tmp_path):
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [40, 20, 20, 10])
    arrays = {f"{role}_images": draw.integers(0, 256, (90, 8, 8, 1), np.uint8) for role in ("train", "test")}
    np.savez(tmp_path / "data.npz", train_labels=labels, test_labels=labels, **arrays)
    options = QUICK | {"data": f"npz:{tmp_path / 'data.npz'}", "batch_size": 16}
    run = train(tmp_path / "run", method="at_bsl", steps=1, val_fraction=0.2, **options)
    assert set(run.metrics()[-1]["groups"]["val_robust"]) == {"head", "medium", "tail"}
    assert "groups" not in train(tmp_path / "even", method="standard", **QUICK).metrics()[-1]
    report = evaluate_run(run.path, version="custom", attacks=["apgd-ce"], n_examples=20, progress=False)
    assert set(report.groups) == {"head", "medium", "tail"}
    assert report.data_name == options["data"]


def test_a_settings_object_and_single_settings_are_the_same(tmp_path):
    settings = TrainSettings(method="n_fgsm", **QUICK)
    a = train(tmp_path / "a", settings)
    b = train(tmp_path / "b", **QUICK, method="n_fgsm")
    c = train(tmp_path / "c", TrainSettings(**QUICK | {"epochs": 9}), method="n_fgsm", epochs=1)
    assert a.config() == b.config() == c.config()
    assert TrainSettings.from_config(a.config()) == TrainSettings.of(
        settings, {"progress": True, "mean": [0.0], "std": [1.0]}
    )
    first, second = (load_tensors(run.weights("last"))[0] for run in (a, b))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_changed_setting_on_resume_is_named_with_both_values(tmp_path):
    train(tmp_path / "run", method="n_fgsm", **QUICK)
    with pytest.raises(ValueError, match=r"method\.eps: 0\.2, now 0\.1; training\.batch_size: 128, now 64"):
        train(tmp_path / "run", method="n_fgsm", **QUICK | {"eps": 0.1, "batch_size": 64})


def test_a_folder_that_cannot_be_written_ends_it_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into .*file/run"):
        train(tmp_path / "file" / "run", **QUICK)


def test_an_architecture_that_does_not_take_the_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"does not take images of 1 x 8 x 8 from digits: .*224"):
        train(tmp_path / "run", **QUICK | {"model": "vit_tiny_patch16_224", "model_options": None})


def test_a_log_file_gets_a_line_an_epoch_with_the_time_left(tmp_path, capfd):
    train(tmp_path / "run", method="n_fgsm", **QUICK | {"epochs": 2, "progress": True})
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert lines[0].endswith("left")


@pytest.mark.parametrize("method", ["trades", "mart", "awp", "trades_awp", "te", "trades_te"])
def test_methods_against_robust_overfitting_train_from_settings(tmp_path, method):
    common = {"data": "digits", "train_size": 100, "model_options": {"width": 2}, "augment": "none", "eps": 0.1,
              "method": method, "steps": 1, "val_steps": 1, "batch_size": 50, "progress": False, "schedule": "step",
              "milestones": [2]}  # fmt: skip
    whole = train(tmp_path / "whole", **common, epochs=3)
    rows = whole.metrics()
    assert all(row["train_loss"] > 0 for row in rows)
    if "te" in method.split("_"):
        assert "train_ensembling" in rows[-1]
        table = whole.load_state()["method"]["table"]
        assert table.shape == (100, 10)
        assert (table.sum(1) > 0).all()


def test_the_guard_is_a_setting_and_a_run_of_before_resumes_without_it(tmp_path):
    run = train(tmp_path / "run", method="fgsm", guard="rollback", guard_remedy="more_steps", **QUICK)
    training = run.config()["training"]
    assert (training["guard"], training["guard_remedy"]) == ("rollback", "more_steps")
    assert "['CollapseGuard']" in str([name for name, _ in run.load_state()["observers"]])
    assert train(tmp_path / "run", method="fgsm", guard="rollback", guard_remedy="more_steps", **QUICK).metrics()
    with pytest.raises(ValueError, match="guard: rollback, now none"):
        train(tmp_path / "run", method="fgsm", **QUICK)

    old = train(tmp_path / "old", method="fgsm", **QUICK)
    config = old.config()
    for name in ("guard", "guard_remedy"):  # a version that knew no guard wrote it
        del config["training"][name]
    old.write_config(config)
    assert len(train(tmp_path / "old", TrainSettings.from_config(config), resume=True).metrics()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guard": "pray"}, "guard"),
        ({"guard": "rollback", "guard_remedy": "hope"}, "guard_remedy"),
        ({"guard_remedy": "n_fgsm"}, "give guard=rollback with it"),
        ({"guard": "warn", "guard_remedy": "n_fgsm"}, "guard=warn has none"),
        ({"guard": "warn", "val_fraction": 0.0}, "give val_fraction above 0"),
        ({"guard": "warn", "method": "standard"}, "no attack"),
    ],
)
def test_a_guard_that_cannot_work_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **(QUICK | {"method": "fgsm"} | settings))


def test_label_noise_comes_last_and_leaves_the_images(tmp_path):
    clean, half, all_new = (
        load_splits(TrainSettings(data="digits", train_size=200, label_noise=rate, imbalance_ratio=0.5, data_seed=3))
        for rate in (None, 0.5, 1.0)
    )
    for noisy in (half, all_new):
        assert torch.equal(noisy.train.images, clean.train.images)
        assert torch.equal(noisy.train.clean_labels, clean.train.labels)
        assert noisy.class_counts == torch.bincount(noisy.train.labels, minlength=10).tolist()
        assert torch.equal(noisy.val.labels, clean.val.labels)
    changed = half.train.labels != half.train.clean_labels
    assert 40 < int(changed.sum()) < 140
    assert torch.equal(half.train.labels[changed], all_new.train.labels[changed])


INJECTED = QUICK | {"augment": "none", "inject_beta": "1/10", "train_size": 200}


def test_a_run_with_injected_features_trains_on_them_and_records_them(tmp_path, monkeypatch):
    module, seen = import_module("at_extensions.commands.train"), []

    class Spy(module.Trainer):
        def fit(self, train, val):
            seen.append((self.method, self._val_attack, train, val))
            return super().fit(train, val)

    monkeypatch.setattr(module, "Trainer", Spy)
    run = train(tmp_path / "run", method="fgsm", inject_mode="orthogonal", **INJECTED)
    ((method, val_attack, batches, val),) = seen
    assert len(batches.split) == 200
    assert batches.image_range == val.image_range == method.image_range == method.attack.image_range
    assert val_attack.image_range == method.image_range
    injection = Injection.recorded(run.config()["data"])
    assert injection == Injection(0.1, "orthogonal")
    plain = load_dataset("digits")
    expected = inject(*plain.val.tensors(), carriers(10, (1, 8, 8)), 0.1, mode="orthogonal")
    torch.testing.assert_close(val.split.images, expected, rtol=0, atol=1e-6)
    assert torch.equal(batches.split.images, injection.into_split(plain.train.subset(200), 0).images)
    assert TrainSettings.from_config(run.config()).inject_mode == "orthogonal"


def test_a_run_with_injected_features_resumes_to_the_same_weights(tmp_path):
    options = INJECTED | {"method": "fgsm", "inject_permuted": True, "inject_seed": 2}
    whole = train(tmp_path / "whole", **options | {"epochs": 2})
    cut = tmp_path / "cut"

    class Stop(Exception):
        pass

    trainer = import_module("at_extensions.commands.train").Trainer
    epoch = trainer._epoch

    def interrupted(self, *args):
        if self.history.rows:
            raise Stop
        epoch(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_epoch", interrupted)
        with pytest.raises(Stop):
            train(cut, **options | {"epochs": 2})
    resumed = train(cut, **options | {"epochs": 2})
    assert len(resumed.metrics()) == 2
    a, b = (load_tensors(run.weights("last"))[0] for run in (whole, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match=r"data.inject_seed: 2, now 3"):
        train(cut, **options | {"epochs": 2, "inject_seed": 3})


def test_a_run_without_features_records_none(tmp_path):
    config = train(tmp_path / "run", method="fgsm", **QUICK).config()
    assert not [key for key in config["data"] if key.startswith("inject")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inject_beta": 8}, "inject_beta must lie in .* did you mean 8/255"),
        ({"inject_beta": None, "inject_permuted": True}, "inject_permuted changes nothing without an amplitude"),
        ({"inject_beta": None, "inject_mode": "reverse"}, "inject_mode changes nothing"),
        ({"inject_mode": "revers"}, "did you mean 'reverse'"),
        ({"inject_seed": -1}, "inject_seed must be at least 0"),
        ({"data": "npz:ODD"}, "even number of pixels, got 7"),
        ({"data": "npz:MANY"}, "carriers for at most 6 classes, got 8"),
    ],
)
def test_features_that_cannot_be_injected_are_refused_before_any_training(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    for name, side, classes in (("ODD", 7, 2), ("MANY", 2, 8)):
        labels = np.arange(80) % classes
        images = np.zeros((80, side, side, 3), np.uint8)
        np.savez(f"{name}.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    options = INJECTED | {"train_size": None} | change
    if "data" in change:
        options["data"] += ".npz"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_crops_of_images_with_features_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="augment='crop' moves and mirrors the injected patterns"):
        train(tmp_path / "run", method="fgsm", **INJECTED | {"augment": "crop"})
