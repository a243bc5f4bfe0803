"""Random labels: bookkeeping of kept and flipped labels on real runs, resuming, and inputs that are refused."""

import hashlib
import json
import warnings

import pytest
import torch

from at_extensions.attacks import PGD, perturb
from at_extensions.commands.train import load_splits, train
from at_extensions.experiments import Cell, Memorisation, random_labels, random_labels_study, running
from at_extensions.experiments.summary import summarise
from at_extensions.models import load_model
from at_extensions.runs import RunDirectory
from at_extensions.settings import TrainSettings
from at_extensions.untouched import RandomStream

TINY = {"methods": ["te", "standard"], "rates": [0, 0.6], "seeds": [0], "epochs": 2, "train_size": 60, "eps": 0.1,
        "model_options": {"width": 4}, "steps": 1, "batch_size": 20, "pgd_steps": 2, "n_test": 40,
        "n_instability": 16, "progress": False}  # fmt: skip
CELLS = ["te-r0-seed0", "standard-r0-seed0", "te-r0.6-seed0", "standard-r0.6-seed0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a tiny study, trained once."""
    out = tmp_path_factory.mktemp("study") / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        progress = random_labels(out, **TINY)
    assert progress.failed == {}
    return out


def result(folder, cell):
    return json.loads((folder / f"{cell}.json").read_text())


def test_the_study_is_methods_by_rates_against_the_first_method():
    study = random_labels_study(["trades", "n_fgsm", "standard"], [0, 0.25], kind="other", common={"steps": 3})
    assert list(study.arms) == [f"{m}-r{r}" for r in ("0", "0.25") for m in ("trades", "n_fgsm", "standard")]
    assert study.pairs[2:] == [("n_fgsm-r0.25", "trades-r0.25"), ("standard-r0.25", "trades-r0.25")]
    options = {cell.arm: cell.options for cell in study.cells(seeds=[0])}
    assert options["trades-r0.25"] == {"steps": 3, "method": "trades", "label_noise": 0.25, "label_noise_kind": "other"}
    assert options["standard-r0"]["steps"] is None
    assert options["n_fgsm-r0"]["alpha"] is None


@pytest.mark.parametrize("cell", CELLS)
def test_kept_and_flipped_labels_are_counted_as_by_a_slow_loop(finished, cell):
    run, row = RunDirectory(finished / "runs" / cell), result(finished, cell)
    splits = load_splits(TrainSettings.from_config(run.config()))
    images, labels = splits.train.tensors()
    model = load_model(run.weights("last"))
    attack = PGD(model, 0.1, 0.025, 2)
    attacked = perturb(attack, images, labels, stream=RandomStream(0))
    for name, seen in (("clean", images), ("pgd2", attacked)):
        counts = {group: [0, 0] for group in ("train", "kept", "flipped", "corrected")}
        for i in range(60):
            predicted, given, true = (
                int(v) for v in (model(seen[i : i + 1]).argmax(), labels[i], splits.train.clean_labels[i])
            )
            groups = ["train", "kept"] if given == true else ["train", "flipped"]
            for group in groups:
                counts[group][0] += predicted == given
                counts[group][1] += 1
            if given != true:
                counts["corrected"][0] += predicted == true
                counts["corrected"][1] += 1
        for group, (right, total) in counts.items():
            found = row["last"].get(group, {}).get(name)
            assert found == ({"correct": right, "images": total, "accuracy": right / total} if total else None)
    assert row["flipped_share"] == int((labels != splits.train.clean_labels).sum()) / 60
    assert (row["flipped_share"] == 0) == ("-r0-" in cell)
    test, true = splits.test.subset(40).tensors()
    assert row["last"]["test"]["clean"]["correct"] == int((model(test).argmax(1) == true).sum())
    assert "best" not in row


def test_groups_without_images_are_absent_from_the_means_too(finished):
    means = summarise(random_labels_study(["te", "standard"], [0, 0.6]), finished).means
    assert "last/flipped/clean" in means["te-r0.6"]
    assert not [name for name in means["te-r0"] if "flipped/" in name or "corrected" in name]
    assert all(value == value for of_arm in means.values() for value in of_arm.values())


def test_rates_differ_in_labels_alone(finished):
    clean, noisy = (
        load_splits(TrainSettings.from_config(RunDirectory(finished / "runs" / cell).config())).train
        for cell in ("te-r0-seed0", "te-r0.6-seed0")
    )
    assert torch.equal(clean.images, noisy.images)
    assert torch.equal(clean.labels, noisy.clean_labels)
    assert not torch.equal(clean.labels, noisy.labels)


def test_the_tables_auroc_is_the_share_of_pairs_in_the_right_order(finished):
    run, row = RunDirectory(finished / "runs" / "te-r0.6-seed0"), result(finished, "te-r0.6-seed0")
    train_split = load_splits(TrainSettings.from_config(run.config())).train
    table = run.load_state()["method"]["table"].double()
    suspicion = [1 - (z[y] / z.sum()).item() for z, y in zip(table, train_split.labels)]
    flipped = (train_split.labels != train_split.clean_labels).tolist()
    wrong = [s for s, f in zip(suspicion, flipped) if f]
    right = [s for s, f in zip(suspicion, flipped) if not f]
    ordered = sum((w > r) + 0.5 * (w == r) for w in wrong for r in right)
    assert row["table_auroc"] == pytest.approx(ordered / (len(wrong) * len(right)), abs=1e-12)
    assert row["table_disagrees"] == sum(int(z.argmax()) != y for z, y in zip(table, train_split.labels)) / 60
    assert "table_auroc" not in result(finished, "te-r0-seed0")
    assert "table_disagrees" in result(finished, "te-r0-seed0")
    assert "table_disagrees" not in result(finished, "standard-r0.6-seed0")


def test_the_attacks_share_is_the_gap_between_the_curves_and_clean_training_has_none(finished):
    row, clean = result(finished, "te-r0.6-seed0"), result(finished, "standard-r0.6-seed0")
    at = row["instability"]["steps"].index(1.0)
    gap = row["instability"]["recomputed"]["change"][at] - row["instability"]["frozen"]["change"][at]
    assert row["instability_attack"] == gap != 0
    assert row["instability"]["n_images"] == 16
    assert row["instability"]["lr"] == 0.1
    assert clean["instability"]["recomputed"] == clean["instability"]["frozen"]
    assert clean["instability_attack"] == 0


def test_measuring_again_gives_the_same_and_leaves_the_run_alone(finished):
    run = RunDirectory(finished / "runs" / "te-r0.6-seed0")
    files = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.path.rglob("*") if path.is_file()}
    random_state = torch.get_rng_state()
    again = Memorisation(2, 40, 16)(run, Cell("te-r0.6", 0, None, {}, True))
    assert torch.equal(torch.get_rng_state(), random_state)
    row = result(finished, "te-r0.6-seed0")
    assert {name: row[name] for name in again} == json.loads(json.dumps(again))
    assert files == {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.path.rglob("*") if path.is_file()
    }


def test_the_best_epoch_is_measured_where_there_is_a_validation_split(tmp_path):
    options = {name: TINY[name] for name in ("epochs", "model_options", "eps", "steps", "batch_size", "progress")}
    run = train(tmp_path, method="pgd", label_noise=0.5, val_fraction=0.1, augment="none", **options)
    found = Memorisation(1, 10, 0)(run, Cell("pgd-r0.5", 0, None, {}, True))
    assert found.keys() == {"measured", "flipped_share", "last", "best"}
    same = run.weights("best").read_bytes() == run.weights("last").read_bytes()
    assert (found["best"] == found["last"]) == same


def test_a_model_without_a_gradient_has_no_curves(tmp_path, finished, monkeypatch):
    from at_extensions.methods import Method

    run = RunDirectory(finished / "runs" / "standard-r0-seed0")
    loss = Method.loss
    monkeypatch.setattr(Method, "loss", lambda self, *args: loss(self, *args)._replace(loss=loss(self, *args).loss * 0))
    assert "instability" not in Memorisation(1, 10, 16)(run, Cell("standard-r0", 0, None, {}, True))


def test_figures_and_summary_are_written(finished):
    assert (finished / "memorisation.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "instability.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["differences"]["standard-r0.6 - te-r0.6"]["last/train/pgd2"]["seeds"] == [0]


def test_an_interrupted_study_goes_on_and_a_finished_one_is_read(finished, tmp_path, monkeypatch):
    calls, measure = [], Memorisation.__call__

    def stopping(self, run, cell):
        calls.append(cell.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, run, cell)

    with monkeypatch.context() as patch:
        patch.setattr(Memorisation, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            random_labels(tmp_path, **TINY)
    assert [path.stem for path in tmp_path.glob("*-seed*.json")] == CELLS[:1]
    assert len(random_labels(tmp_path, **TINY).finished) == 4
    for cell in CELLS:  # the same as without an interruption
        before, now = result(finished, cell), result(tmp_path, cell)
        assert {k: now[k] for k in ("last", "instability")} == {k: before[k] for k in ("last", "instability")}

    def no_training(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(running, "train", no_training)
    assert len(random_labels(tmp_path, **TINY).finished) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pgd_steps": 3}, "pgd_steps 2, now 3"),
        ({"n_test": 41}, "n_test 40, now 41"),
        ({"epochs": 3, "methods": ["pgd"]}, "epochs 2, now 3"),
        ({"steps": 2, "methods": ["pgd"]}, "steps 1, now 2"),
        ({"label_noise_kind": "other", "methods": ["pgd"]}, "label_noise_kind 'uniform', now 'other'"),
    ],
)
def test_a_folder_holds_results_of_one_setting(finished, change, message):
    with pytest.raises(ValueError, match=message):
        random_labels(finished, **TINY | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rates": [0, 1.5]}, ValueError, r"noise rate must .*1\.5"),
        ({"rates": [-0.1]}, ValueError, r"noise rate must .*-0\.1"),
        ({"rates": [float("nan")]}, ValueError, "noise rate"),
        ({"rates": [0.5, 0, 0.5]}, ValueError, "noise rate 0.5 is given twice"),
        ({"rates": []}, ValueError, "at least one noise rate"),
        ({"methods": ["pgd", "tradse"]}, ValueError, "did you mean 'trades'"),
        ({"methods": ["pgd", "pgd"]}, ValueError, "method pgd is given twice"),
        ({"methods": []}, ValueError, "at least one method"),
        ({"seeds": []}, ValueError, "at least one seed"),
        ({"seeds": [1, 1]}, ValueError, "once"),
        ({"label_noise_kind": "uniforn"}, ValueError, "did you mean 'uniform'"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"pgd_steps": 0}, ValueError, "pgd_steps"),
        ({"alpha": 0}, ValueError, "alpha"),
        ({"train_size": 10**6}, ValueError, "asked for 1000000 samples"),
        ({"model": "small_cn"}, ValueError, "did you mean 'small_cnn'"),
        ({"model": "preact_resnet18"}, ValueError, "does not take images|three channels|3 channels"),
        ({"model_options": {"widht": 4}}, (ValueError, TypeError), "widht"),
        ({"data": "npz:nowhere.npz"}, FileNotFoundError, "nowhere.npz"),
        ({"rate": [0]}, ValueError, "did you mean 'rates'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(tmp_path, monkeypatch, change, error, message):
    trained = []
    monkeypatch.setattr(running, "train", lambda *args, **options: trained.append(options))
    with pytest.raises(error, match=message):
        random_labels(tmp_path / "out", **TINY | change)
    assert trained == []
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("change", [{"pgd_steps": 0}, {"n_test": 0}, {"n_instability": -1}])
def test_a_measurement_that_cannot_be_right_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Memorisation(**change)
