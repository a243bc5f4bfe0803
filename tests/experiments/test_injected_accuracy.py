"""The measurement of runs with injected features, on models of which the answers are known."""

import pytest
import torch
from torch import nn

from at_extensions import create_model
from at_extensions.data import carriers, count_outside, inject, load_dataset
from at_extensions.experiments import Cell, InjectedAccuracy
from at_extensions.experiments.injected_accuracy import collapse_epoch
from at_extensions.runs import RunDirectory, save_weights

BETA = 0.1
CELL = Cell("a", 0, None, {}, True)
PATTERNS = carriers(10, (1, 8, 8))
DATA = {"name": "digits", "root": None, "image_size": None}


class Matched(nn.Module):
    """Say which pattern an image holds most of: the logits are V x."""

    def __init__(self, sign=1.0):
        super().__init__()
        self.weight = nn.Parameter(sign * PATTERNS.flatten(1))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return a maker of a run of a given model, its data and its validation accuracies under attack."""

    def run(model, robust=(0.5, 0.5), eps=0.01, **injected):
        monkeypatch.setattr("at_extensions.experiments.injected_accuracy.load_model", lambda _: model)
        directory = RunDirectory(tmp_path / "run")
        save_weights(create_model("small_cnn", 10, in_chans=1, width=2), directory.weights("last"))
        record = {"inject_mode": "add", "inject_permuted": False, "inject_seed": 0} | injected if injected else {}
        directory.write_config({"data": DATA | record, "method": {"name": "fgsm", "eps": eps}})
        directory.write_metrics([{"epoch": e, "val_robust_accuracy": r} for e, r in enumerate(robust, 1)])
        return directory

    return run


def test_a_model_of_the_features_alone_is_right_with_them_and_wrong_with_their_opposites(make):
    found = InjectedAccuracy(pgd_steps=2)(make(Matched(), inject_beta=BETA, inject_mode="orthogonal"), CELL)
    assert found["injected"]["clean"] == {"correct": 355, "images": 355, "accuracy": 1.0}
    assert found["injected"]["pgd2"]["accuracy"] == 1.0  # eps is a tenth of beta
    assert found["uninjected"]["clean"]["accuracy"] < 0.5
    assert found["reversed"]["clean"]["accuracy"] == 0.0
    assert found["carrier_only"]["clean"] == {"correct": 10, "images": 10, "accuracy": 1.0}
    assert found["collapsed"] == 0
    backwards = InjectedAccuracy(pgd_steps=2)(
        make(Matched(-1.0), inject_beta=BETA, inject_mode="reverse_orthogonal"), CELL
    )
    assert backwards["injected"]["clean"]["accuracy"] == 1.0
    assert backwards["reversed"]["clean"]["accuracy"] == 0.0


def test_an_attack_beyond_the_amplitude_takes_the_features_away(make):
    run = make(Matched(), inject_beta=BETA, inject_mode="orthogonal", eps=0.3)
    found = InjectedAccuracy(pgd_steps=4)(run, CELL)
    assert found["injected"]["clean"]["accuracy"] == 1.0
    assert found["injected"]["fgsm"]["accuracy"] == found["injected"]["pgd4"]["accuracy"] == 0.0


def test_values_outside_the_unit_interval_are_counted(make):
    found = InjectedAccuracy(pgd_steps=1)(make(Matched(), inject_beta=BETA), CELL)
    test = load_dataset("digits", val_fraction=0.0).test
    expected = count_outside(inject(*test.tensors(), PATTERNS, BETA))
    assert found["outside"]["values"] == expected > 1000
    assert found["outside"]["share"] == expected / (355 * 64)


def test_a_part_of_the_test_images_is_the_same_part_in_each_version(make):
    found = InjectedAccuracy(pgd_steps=1, test_size=50)(make(Matched(), inject_beta=0.0), CELL)
    assert found["injected"] == found["uninjected"] == found["reversed"]
    assert found["injected"]["clean"]["images"] == 50
    assert found["outside"]["values"] == 0
    assert "carrier_only" not in found


def test_a_run_without_features_is_measured_on_its_images(make):
    found = InjectedAccuracy(pgd_steps=1, test_size=50)(make(Matched()), CELL)
    assert found["injected"]["clean"]["images"] == 50
    assert not {"uninjected", "reversed", "carrier_only"} & found.keys()


def test_a_fall_during_training_and_a_gap_of_the_attacks_are_collapses(make):
    measure = InjectedAccuracy(pgd_steps=1, test_size=50)
    assert measure(make(Matched(), robust=(0.5, 0.6, 0.31)), CELL)["collapsed"] == 0
    fallen = measure(make(Matched(), robust=(0.5, 0.6, 0.29)), CELL)
    assert (fallen["collapsed"], fallen["collapse_epoch"]) == (1, 3)
    recovered = measure(make(Matched(), robust=(0.5, 0.1, 0.5)), CELL)
    assert (recovered["collapsed"], recovered["collapse_epoch"]) == (0, 2)
    accuracies = {"fgsm": {"accuracy": 0.9}, "pgd1": {"accuracy": 0.55}}
    assert measure._verdict(accuracies, [])["collapsed"] == 1
    assert measure._verdict(accuracies | {"pgd1": {"accuracy": 0.65}}, [])["collapsed"] == 0


def test_the_epoch_of_a_collapse_is_the_first_below_half_of_the_best_before():
    def rows(*values):
        return [{"epoch": e} | ({} if v is None else {"val_robust_accuracy": v}) for e, v in enumerate(values, 1)]

    assert collapse_epoch(rows(0.2, None, 0.4, 0.21, 0.19, 0.0)) == 5
    assert collapse_epoch(rows(0.0, 0.1, 0.2)) is None
    assert collapse_epoch([]) is None


def test_the_curvature_is_the_largest_eigenvalue_of_the_injected_images(make):
    """Of a linear model W with probabilities p the input Hessian is W' (diag p - p p') W."""
    model = Matched(0.02)
    found = InjectedAccuracy(pgd_steps=1, test_size=30, curvature_images=3)(make(model, inject_beta=BETA), CELL)
    test, weight = load_dataset("digits", val_fraction=0.0).test, model.weight.detach().double()
    chosen = test.subset(30).subset(3)
    images = inject(*chosen.tensors(), PATTERNS, BETA)
    largest = []
    for p in (images.flatten(1).double() @ weight.T).softmax(1):
        hessian = weight.T @ (p.diag() - p.outer(p)) @ weight
        largest.append(torch.linalg.eigvalsh(hessian).abs().max())
    assert found["input_curvature"] == pytest.approx(torch.stack(largest).mean().item(), rel=1e-3)
    without = InjectedAccuracy(pgd_steps=1, test_size=30, curvature_images=0)
    assert "input_curvature" not in without(make(model, inject_beta=BETA), CELL)


@pytest.mark.parametrize("change", [{"pgd_steps": 0}, {"test_size": 0}, {"curvature_images": -1}])
def test_a_measurement_that_cannot_be_right_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        InjectedAccuracy(**change)
