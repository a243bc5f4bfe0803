"""The experiment of injected features: its grid, its rates, and that it goes on where it stopped."""

import json

import pytest
from PIL import Image

from at_extensions.experiments import Arm, Study, feature_injection, injection_study
from at_extensions.experiments.feature_injection import collapse_rates
from at_extensions.intervals import wilson_interval
from at_extensions.runs import write_json
from at_extensions.settings import InjectionSettings

TINY = {"eps": "0.1", "betas": "0,1/10", "seeds": [0], "epochs": 1, "train_size": 100, "test_size": 30, "val_steps": 1,
        "attack_steps": 2, "model_options": {"width": 4}, "progress": False}  # fmt: skip


def test_the_grid_is_every_amplitude_radius_and_method_with_controls():
    settings = InjectionSettings(betas=[0, 8 / 255], eps=[4 / 255], methods=["fgsm", "pgd"], pgd_steps=5)
    study = injection_study(settings)
    assert list(study.arms) == [
        "fgsm-eps4-beta0", "fgsm-eps4-beta8", "fgsm-eps4-beta8-permuted",
        "pgd-eps4-beta0", "pgd-eps4-beta8", "pgd-eps4-beta8-permuted",
    ]  # fmt: skip
    options = study.cells(arms=["pgd-eps4-beta8-permuted"])[0].options
    expected = {"method": "pgd", "eps": 4 / 255, "alpha": 2 / 255, "steps": 5, "inject_beta": 8 / 255,
                "inject_permuted": True, "inject_mode": "add", "augment": "none"}  # fmt: skip
    assert options.items() >= expected.items()
    assert not [name for name in injection_study(InjectionSettings(control=False)).arms if "permuted" in name]
    assert injection_study(InjectionSettings(train_options={"weight_decay": 0.0})).common["weight_decay"] == 0.0


def test_it_trains_measures_and_goes_on(tmp_path):
    first = feature_injection(tmp_path, **TINY | {"control": False})
    assert [rate.arm for rate in first.rates] == ["fgsm-eps25.5-beta0", "fgsm-eps25.5-beta25.5"]
    before = (tmp_path / "fgsm-eps25.5-beta0-seed0.json").read_text()
    second = feature_injection(tmp_path, **TINY)
    assert (tmp_path / "fgsm-eps25.5-beta0-seed0.json").read_text() == before
    assert [(rate.beta, rate.permuted, rate.runs) for rate in second.rates] == [
        (0, False, 1),
        (0.1, False, 1),
        (0.1, True, 1),
    ]
    row = json.loads((tmp_path / "fgsm-eps25.5-beta25.5-seed0.json").read_text())
    assert row["options"]["inject_beta"] == 0.1
    assert second.rates[1].robust == row["injected"]["pgd2"]["accuracy"]
    assert second.rates[1].collapsed == row["collapsed"]
    saved = json.loads((tmp_path / "collapse.json").read_text())["rates"]
    assert [rate["arm"] for rate in saved] == [rate.arm for rate in second.rates]
    for path in second.files[1:]:
        assert Image.open(path).size[0] > 500
    assert "fgsm-eps25.5-beta25.5-permuted" in repr(second)
    assert json.loads((tmp_path / "summary.json").read_text())["means"]["fgsm-eps25.5-beta0"]["collapsed"] in (0.0, 1.0)


def test_rates_are_shares_of_the_runs_with_wilsons_interval(tmp_path):
    study = Study("?", {"b": Arm({"method": "fgsm"}), "a": Arm({"method": "pgd"})}, name="toy")
    for arm, seed, collapsed, right in (("b", 0, 1, 0.1), ("b", 1, 0, 0.4), ("b", 2, 1, 0.1), ("a", 0, 0, 0.5)):
        options = {"method": study.arms[arm].options["method"], "eps": "4/255", "inject_beta": "8/255"}
        accuracies = {"clean": {"accuracy": 0.9}, "fgsm": {"accuracy": 0.8}, "pgd20": {"accuracy": right}}
        row = {"arm": arm, "seed": seed, "options": options, "collapsed": collapsed, "injected": accuracies}
        write_json(tmp_path / f"{arm}-seed{seed}.json", row)
    found = collapse_rates(study, tmp_path)
    assert [(rate.arm, rate.method, rate.collapsed, rate.runs) for rate in found] == [
        ("b", "fgsm", 2, 3),
        ("a", "pgd", 0, 1),
    ]
    assert found[0].interval == wilson_interval(2, 3)
    assert found[0].robust == pytest.approx(0.2)
    assert (found[0].eps, found[0].beta, found[0].permuted) == (4 / 255, 8 / 255, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": "8"}, "each of betas .* did you mean 8/255"),
        ({"eps": "8/255,8/255"}, "eps must hold at least one value, each once"),
        ({"eps": "8"}, "each of eps .* did you mean 8/255"),
        ({"methods": "fgms"}, "did you mean 'fgsm'"),
        ({"mode": "minus"}, "unknown mode 'minus'"),
        ({"seeds": [-1]}, "each of seeds"),
        ({"train_options": {"lrr": 1}}, "lr"),
    ],
)
def test_settings_that_cannot_be_right_are_refused_before_any_work(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        feature_injection(tmp_path / "out", **TINY | change)
    assert not (tmp_path / "out").exists()


def test_an_experiment_of_which_every_cell_fails_says_so(tmp_path):
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match="no cell"):
        feature_injection(tmp_path, **TINY | {"data": "npz:nowhere.npz", "betas": "0"})
