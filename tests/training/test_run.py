"""A whole run from plain settings."""

import pytest
import torch

from at_extensions.models import load_model
from at_extensions.runs import load_tensors
from at_extensions.training import train

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
