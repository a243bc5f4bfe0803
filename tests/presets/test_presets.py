"""Presets: the recipes of papers, as settings that ``train`` takes."""

import pytest

from at_extensions.cli import main
from at_extensions.methods import create_method
from at_extensions.models import create_model
from at_extensions.presets import list_presets, preset
from at_extensions.runs import RunDirectory
from at_extensions.settings import TrainSettings


def small_cnn():
    return create_model("small_cnn", 3, in_chans=1, width=4)


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_names_settings_of_train(name):
    assert TrainSettings.from_dict(preset(name)).to_dict().keys() > preset(name).keys()


def test_deat_is_the_papers_recipe():
    recipe = preset("deat")
    assert recipe["method"] == "pgd"
    assert recipe["optimizer"] == "deat"
    assert [recipe[key] for key in ("model", "batch_size", "weight_decay", "epochs", "milestones")] == [
        "preact_resnet18", 128, 5e-4, 110, [100, 105],
    ]  # fmt: skip
    assert [recipe[key] for key in ("eps", "alpha", "steps", "lr", "val_fraction")] == ["8/255", "2/255", 10, 0.1, 0]


def test_reat_is_the_released_recipe_on_all_of_the_tail():
    recipe = preset("reat")
    assert [recipe[key] for key in ("method", "imbalance_ratio", "val_fraction", "epochs", "milestones", "lr")] == [
        "reat", 0.02, 0, 80, [60, 75], 0.1,
    ]  # fmt: skip


def test_te_is_the_released_recipe_with_the_penalty_from_epoch_90_to_150():
    recipe = preset("te")
    assert [recipe[key] for key in ("model", "epochs", "milestones", "weight_decay", "batch_size", "lr")] == [
        "cifar_resnet18", 200, [100, 150], 5e-4, 128, 0.1,
    ]  # fmt: skip
    method = create_method("te", small_cnn(), num_samples=3, num_classes=3, epochs=200, milestones=[100, 150])
    assert (method.start, method.end) == (90, 150)


def test_an_unknown_preset_is_named_with_the_nearest(capsys):
    with pytest.raises(ValueError, match="did you mean 'deat'"):
        preset("daet")
    assert main(["train", "somewhere", "--preset", "daet"]) == 1
    assert "did you mean 'deat'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["train", "somewhere", "--preset"])
    assert stop.value.code == 2


SMALL = ["--data", "digits", "--model", "small_cnn", "--model-options", '{"width": 4}', "--steps", "1", "--epochs=1",
         "--augment", "crop", "--milestones", "[1]", "--train-size", "200", "--val-fraction", "0.1"]  # fmt: skip


@pytest.mark.parametrize("given", [["--preset", "deat"], ["--preset=deat"]])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_given_beside_a_preset_wins(tmp_path, given, last):
    rest = [str(tmp_path / "run"), *SMALL]
    assert main(["train", *rest, *given] if last else ["train", *given, *rest]) == 0
    config = RunDirectory(tmp_path / "run").config()
    assert config["training"]["optimizer"] == "deat"
    assert config["training"]["schedule"] == "step"
    assert config["training"]["epochs"] == 1
    assert config["data"]["name"] == "digits"
    assert config["method"]["steps"] == 1
