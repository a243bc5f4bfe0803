"""The commands that a report gives: read back, they ask for what was done."""

import shlex

import jsonargparse
import pytest

from at_extensions.commands.evaluate import evaluate_run
from at_extensions.commands.train import train
from at_extensions.publishing.reproduction import evaluate_command, train_command


def read_back(command, function):
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("at-extensions", function.__name__.removesuffix("_run"))
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function, as_positional=True)
    return parser.parse_args(arguments)


def test_training_is_asked_for_as_it_was(tmp_path):
    settings = {
        "data": "digits", "val_fraction": 0.2, "model": "small_cnn", "model_options": {"width": 2}, "mean": [0.5],
        "method": "pgd", "eps": 0.1, "alpha": 0.02, "steps": 1, "epochs": 1, "batch_size": 512, "lr": 0.05,
        "schedule": "step", "milestones": [1], "augment": "none", "val_steps": 1, "ema": 0.5, "train_size": 40,
        "channels_last": False, "seed": 3, "progress": False,
    }  # fmt: skip
    run = train(tmp_path / "my run", **settings)
    found = read_back(train_command(run.config(), "my run"), train)
    assert str(found.out) == "my run"
    for key, value in settings.items():
        if key != "progress":
            asked = getattr(found, key)
            assert (float(asked) if key in ("eps", "alpha") else asked) == value, key


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
    found = read_back(evaluate_command(make_run.evaluation(), "runs/a"), evaluate_run)
    assert (found.run, found.norm, found.version, found.seed) == ("runs/a", "Linf", "standard", 3)
    assert float(found.eps) == 8 / 255
    custom = make_run.evaluation(version="custom", precision="bf16", norm="L2", eps=0.5)
    found = read_back(evaluate_command(custom, "a"), evaluate_run)
    assert (found.attacks, found.precision, found.norm) == (["apgd-ce", "apgd-t"], "bf16", "L2")
    assert float(found.eps) == 0.5


def test_words_of_the_shell_stay_words():
    config = {"data": {"name": "npz:$(rm) x;"}, "model": {"name": "m"}, "method": {"name": "pgd"}, "training": {}}
    assert shlex.split(train_command(config, "x; y"))[2:5] == ["x; y", "--data", "npz:$(rm) x;"]
