"""Settings: the command line, YAML, presets, Python and a run's config.yaml give the same objects."""

import json
import re
import shlex

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from at_extensions import cli
from at_extensions.configuration import Settings
from at_extensions.presets import list_presets, preset
from at_extensions.settings import (
    CriticalitySettings,
    EvaluateSettings,
    Paper,
    PublishSettings,
    TrainSettings,
    differences,
    read_settings,
)

FEW = {
    "data": "npz:a b.npz", "val_fraction": 0.2, "model_options": {"width": 2}, "mean": [0.5, 0.25, 0.1], "eps": 4 / 255,
    "alpha": 0.2, "steps": 3, "method_options": {"k": 1.0}, "epochs": 7, "lr": 1e-4, "milestones": [3, 5],
    "channels_last": False, "compile": "reduce-overhead", "ema": 0.995, "seed": 3, "train_size": 100, "device": None,
}  # fmt: skip
FEW.pop("device")
RECIPE = {"name": "small_cnn", "num_classes": 10, "mean": [0.5, 0.25, 0.1], "std": [1.0] * 3, "in_chans": 3, "width": 2}


def parsed(words):
    """The settings that the command line makes of these words."""
    command, options = cli.parse(words)
    options.pop(command.argument or "", None)
    return command.settings.from_dict(options)


def test_command_line_yaml_and_python_give_the_same(tmp_path):
    python = TrainSettings(**FEW)
    words = ["train", "out"]
    for name, value in FEW.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(FEW))
    assert parsed(words) == python
    assert TrainSettings.from_dict(read_settings(tmp_path / "few.yaml")) == python
    assert parsed(["train", "out", *python.arguments()]) == python


NUMBER = st.floats(1e-6, 1, exclude_max=True)


@given(
    st.builds(
        TrainSettings,
        eps=st.one_of(NUMBER, st.integers(1, 254).map(lambda n: n / 255)),
        alpha=st.none() | NUMBER,
        val_fraction=NUMBER,
        milestones=st.none() | st.lists(st.integers(1, 99), min_size=1),
        mean=st.none() | st.lists(NUMBER, min_size=2),
        model_options=st.none() | st.dictionaries(st.sampled_from("abc"), st.integers() | st.booleans(), min_size=1),
        data=st.sampled_from(["digits", "npz:with space;$(x).npz", "folder:a,b"]),
        compile=st.sampled_from([True, False, "max-autotune"]),
        resume=st.booleans(),
        seed=st.integers(-3, 10**9),
    )
)
def test_settings_survive_the_command_line_that_they_write(settings):
    command = shlex.join(["train", "out", *settings.arguments()])
    assert parsed(shlex.split(command)) == settings


def test_a_runs_config_gives_its_settings_back(tmp_path):
    settings = TrainSettings(**FEW, std=[1.0] * 3)
    config = yaml.safe_load(yaml.safe_dump(settings.to_config(RECIPE) | {"versions": {"torch": "2"}}))
    config["data"]["class_counts"] = [3, 4]
    assert TrainSettings.from_config(config) == settings
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert TrainSettings.from_dict(read_settings(tmp_path / "config.yaml")) == settings


def test_an_older_config_keeps_todays_defaults_and_its_own_words():
    older = TrainSettings(steps=4).to_config(RECIPE)
    older["method"]["alpha"] = "2/255"
    del older["training"]["val_steps"], older["data"]["train_size"]
    settings = TrainSettings.from_config(older)
    assert (settings.alpha, settings.val_steps, settings.steps) == (2 / 255, 10, 4)
    older["training"]["epocs"] = 3
    with pytest.raises(ValueError, match=r"unknown setting 'epocs'; did you mean 'epochs'"):
        TrainSettings.from_config(older)


@pytest.mark.parametrize(
    "config", [{}, {"model": {"name": "x"}}, {"data": "x", "model": 3, "method": [], "training": 1}]
)
def test_a_foreign_config_is_refused(config):
    with pytest.raises(ValueError, match=r"not the config\.yaml of a run"):
        TrainSettings.from_config(config)


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_is_settings_of_train(name):
    settings = TrainSettings.from_dict(preset(name))
    assert settings.eps == 8 / 255
    assert TrainSettings.of(settings, {"epochs": 2}) == TrainSettings.from_dict(preset(name) | {"epochs": 2})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bach_size": 3}, ValueError, "unknown setting 'bach_size'; did you mean 'batch_size'"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"epochs": 2.5}, TypeError, "epochs must be a whole number"),
        ({"epochs": "many"}, TypeError, "epochs must be a whole number"),
        ({"epochs": None}, TypeError, "epochs must be a whole number"),
        ({"epochs": True}, TypeError, "epochs must be a whole number"),
        ({"eps": 8}, ValueError, "did you mean 8/255"),
        ({"eps": "eight"}, ValueError, "eps: expected a number or a fraction such as 8/255"),
        ({"eps": None}, TypeError, "eps must be a number"),
        ({"lr": float("nan")}, ValueError, "lr must lie in"),
        ({"val_fraction": 1}, ValueError, r"val_fraction must lie in \[0, 1\)"),
        ({"resume": "perhaps"}, TypeError, "resume must be true or false"),
        ({"model_options": 3}, TypeError, "model_options must be a mapping"),
        ({"model_options": "{width"}, ValueError, "model_options cannot be read as JSON"),
        ({"milestones": "60,late"}, TypeError, "each of milestones must be a whole number"),
        ({"data": 5}, TypeError, "data must be a text"),
    ],
)
def test_a_wrong_setting_is_named(options, error, message):
    with pytest.raises(error, match=message):
        TrainSettings.of(None, options)
    if set(options) <= set(TrainSettings().to_dict()):
        with pytest.raises(error, match=message):
            TrainSettings.of(TrainSettings(), options)


def test_settings_of_another_command_are_refused():
    with pytest.raises(TypeError, match="settings must be TrainSettings, got EvaluateSettings"):
        TrainSettings.of(EvaluateSettings(), {})


def test_lists_are_commas_json_or_single_words():
    for given_attacks in ("apgd-ce,square", "apgd-ce, square", '["apgd-ce", "square"]', ("apgd-ce", "square")):
        assert EvaluateSettings(attacks=given_attacks).attacks == ["apgd-ce", "square"]
    assert EvaluateSettings(attacks="square").attacks == ["square"]
    assert TrainSettings(milestones="60,75").milestones == [60, 75]
    assert CriticalitySettings(model="runs/a", checkpoint="[null]").checkpoint == [None]


def test_a_paper_comes_from_a_file_from_options_or_from_both(tmp_path):
    (tmp_path / "paper.yaml").write_text("title: T\nauthors: A\nlink: https://example.org\n")
    both = parsed(
        ["publish", "run", "--id", "A2024Title", "--paper", str(tmp_path / "paper.yaml"), "--paper.title=U",
         "--paper.additional-data", "--paper.reported", "0.5"]
    )  # fmt: skip
    assert both.paper == Paper("U", "A", "https://example.org", additional_data=True, reported=0.5)
    assert parsed(shlex.split(shlex.join(["publish", "run", *both.arguments()]))) == both
    with pytest.raises(ValueError, match="authors, link missing"):
        parsed(["publish", "run", "--id", "A2024Title", "--paper.title=U"])
    with pytest.raises(ValueError, match="unknown setting 'titel'; did you mean 'title'"):
        PublishSettings(id="A2024Title", paper={"titel": "x"})


def test_differences_name_the_setting_and_both_values():
    before = TrainSettings(eps=0.1, alpha=2 / 255).to_config(RECIPE) | {"versions": {"torch": "1"}}
    after = TrainSettings(eps=0.2, alpha=2 / 255, epochs=3).to_config(RECIPE) | {"versions": {"torch": "2"}}
    before["method"]["alpha"] = "2/255"  # as earlier versions wrote it
    del before["training"]["ema"]
    assert differences(before, after) == ["method.eps: 0.1, now 0.2", "training.epochs: 30, now 3"]
    assert differences(after, after) == []


@pytest.mark.parametrize("settings", [*{c.settings: None for c in cli.COMMANDS.values()}, Paper])
def test_every_setting_is_documented_and_default_values_are_valid(settings):
    assert issubclass(settings, Settings)
    for name, help_text in re.findall(r"^    (\w+): (.*)$", settings.__doc__, re.MULTILINE):
        assert help_text.endswith("."), name
        assert name in settings.__dataclass_fields__
    assert len(re.findall(r"^    \w+: ", settings.__doc__, re.MULTILINE)) == len(settings.__dataclass_fields__)
