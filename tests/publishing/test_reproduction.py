"""The commands that a report gives: read back, they ask for what was done."""

import shlex

import pytest

from at_extensions import cli
from at_extensions.commands.train import train
from at_extensions.publishing.reproduction import evaluate_command, train_command
from at_extensions.settings import EvaluateSettings, TrainSettings


def read_back(command, name):
    """The run directory and the settings that the command line makes of a command."""
    program, *words = shlex.split(command)
    assert (program, words[0]) == ("at-extensions", name)
    found, options = cli.parse(words)
    return options.pop(found.argument), found.settings.from_dict(options)


def test_training_is_asked_for_as_it_was(tmp_path):
    settings = {
        "data": "digits", "val_fraction": 0.2, "model": "small_cnn", "model_options": {"width": 2}, "mean": [0.5],
        "method": "pgd", "eps": 0.1, "alpha": 0.02, "steps": 1, "epochs": 1, "batch_size": 512, "lr": 0.05,
        "schedule": "step", "milestones": [1], "augment": "none", "val_steps": 1, "ema": 0.5, "train_size": 40,
        "channels_last": False, "seed": 3, "progress": False,
    }  # fmt: skip
    run = train(tmp_path / "my run", **settings)
    out, found = read_back(train_command(run.config(), "my run"), "train")
    assert out == "my run"
    assert found == TrainSettings(**settings | {"progress": True, "std": [1.0]})  # std: as the recipe has it


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model": {"name": "x"}},
        {"data": "x", "model": 3, "method": [], "training": 1},
        {"data": {}, "model": {}, "method": {}, "training": {}},
    ],
)
def test_a_configuration_of_another_kind_gives_none(config):
    assert train_command(config, "run") is None


def test_evaluation_is_asked_for_as_it_was(make_run):
    run, found = read_back(evaluate_command(make_run.evaluation(), "runs/a"), "evaluate")
    assert (run, found) == ("runs/a", EvaluateSettings(eps=8 / 255, seed=3, batch_size=250))
    changes = {"version": "custom", "precision": "bf16", "norm": "L2", "eps": 0.5, "compiled": True}
    custom = make_run.evaluation(**changes, indices=list(range(10)), data_name="npz:b.npz")
    expected = {"version": "custom", "precision": "bf16", "norm": "L2", "eps": 0.5, "compile": True}
    expected |= {"attacks": ["apgd-ce", "apgd-t"], "n_examples": 10, "seed": 3, "batch_size": 250}
    assert read_back(evaluate_command(custom, "a", "npz:b.npz"), "evaluate") == ("a", EvaluateSettings(**expected))
    other = read_back(evaluate_command(custom, "a", "digits"), "evaluate")[1]
    assert other == EvaluateSettings(**expected, data="npz:b.npz")


def test_words_of_the_shell_stay_words():
    config = {"data": {"name": "npz:$(rm) x;"}, "model": {"name": "m"}, "method": {"name": "pgd"}, "training": {}}
    assert shlex.split(train_command(config, "x; y"))[2:5] == ["x; y", "--data", "npz:$(rm) x;"]
