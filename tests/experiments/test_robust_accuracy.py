"""The usual measurement of a study, on real runs."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from at_extensions.commands.train import train
from at_extensions.experiments import Arm, Cell, RobustAccuracy, Study, run_study, summary
from at_extensions.models import load_model
from at_extensions.runs import save_weights

TINY = {"data": "digits", "epochs": 1, "train_size": 40, "batch_size": 20, "val_fraction": 0.1, "val_steps": 1}


def test_the_usual_measurement_of_a_real_run(tmp_path):
    study = Study(
        "Does adversarial training help?",
        arms={"pgd": Arm({"method": "pgd", "steps": 1}), "tail": Arm({"method": "at_bsl", "imbalance_ratio": 0.5})},
        common=TINY | {"eps": 0.1},
        seeds=(0,),
        measure=RobustAccuracy(eps="0.05", pgd_steps=2, autoattack=0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        progress = run_study(study, tmp_path, local={"progress": False})
    assert progress.failed == {}
    row = json.loads((tmp_path / "pgd-seed0.json").read_text())
    assert "autoattack" not in row
    for kind in ("last", "best"):
        clean, robust = row[kind]["clean"], row[kind]["pgd2"]
        assert clean["accuracy"] == clean["correct"] / clean["images"]
        assert robust["correct"] <= clean["correct"]
    assert "last/pgd2/tail" in progress.summary.means["tail"]


def test_autoattack_meets_the_first_seed_alone(tmp_path, monkeypatch):
    from at_extensions.experiments import robust_accuracy

    run = train(tmp_path / "run", progress=False, **TINY | {"eps": 0.1, "method": "standard"})
    attacked = []

    class Report:
        def to_dict(self):
            return {"robust_accuracy": 0.5}

    def evaluate(model, data, **settings):
        attacked.append((len(data), settings["eps"], settings["precision"]))
        return Report()

    monkeypatch.setattr(robust_accuracy, "evaluate", evaluate)
    first, second = (Cell("a", seed, None, {}, seed == 0) for seed in (0, 1))
    measure = RobustAccuracy(pgd_steps=0, autoattack=20, precision="bf16")
    assert measure(run, first)["autoattack"] == {"robust_accuracy": 0.5}
    assert "autoattack" not in measure(run, second)
    assert "autoattack" in RobustAccuracy(pgd_steps=0, autoattack=30, every_seed=True)(run, second)
    assert attacked == [(20, 0.1, "bf16"), (30, 0.1, "fp32")]


@pytest.mark.parametrize("same", [False, True])
def test_autoattack_meets_best_and_last_on_the_same_images(tmp_path, monkeypatch, same):
    from at_extensions.experiments import robust_accuracy

    run = train(tmp_path / "run", progress=False, **TINY | {"eps": 0.1, "method": "standard"})
    if not same:  # other weights, so that both are measured
        model = load_model(run.weights("last"))
        with torch.no_grad():
            next(model.parameters()).mul_(-1)
        save_weights(model, run.weights("best"))
    attacked = []

    def evaluate(model, data, **settings):
        robust = torch.arange(20) < (12, 5)[len(attacked)]
        attacked.append((data.labels.tolist(), settings["state_dir"]))
        return SimpleNamespace(
            robust=robust,
            n_examples=20,
            robust_accuracy=robust.double().mean().item(),
            interval=(0.0, 1.0),
            seconds=1.0,
        )

    monkeypatch.setattr(robust_accuracy, "evaluate", evaluate)
    measure = RobustAccuracy(pgd_steps=0, autoattack=20, checkpoints=("best", "last"))
    result = measure(run, Cell("a", 0, None, {}, True))
    assert len(attacked) == len({state for _, state in attacked}) == (1 if same else 2)
    assert attacked[0][0] == attacked[-1][0]
    assert result["best"]["autoattack"]["accuracy"] == 0.6
    assert result["last"]["autoattack"]["accuracy"] == (0.6 if same else 0.25)
    assert result["best_minus_last"] == pytest.approx(0.0 if same else 0.35)
    assert "autoattack" not in result
    assert summary.numbers(result)["best/autoattack"] == 0.6


def test_a_missing_best_checkpoint_is_named(tmp_path):
    run = train(tmp_path / "run", progress=False, **TINY | {"eps": 0.1, "method": "standard", "val_fraction": 0.0})
    with pytest.raises(FileNotFoundError, match="best"):
        RobustAccuracy(pgd_steps=0, autoattack=20, checkpoints=("best",))(run, Cell("a", 0, None, {}, True))


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoints": ("newest",)},
        {"eps": 8},
        {"eps": "8"},
        {"pgd_steps": -1},
        {"autoattack": -1},
        {"precision": "fp16"},
    ],
)
def test_a_measurement_that_cannot_be_right_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change)).rstrip("s")):
        RobustAccuracy(**change)
