"""The induced distribution experiment: its sets, storage, resumption and refusals, against a slow reference."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from torch.nn import functional as F

from at_extensions.analysis import local_dispersion
from at_extensions.attacks import PGD
from at_extensions.commands.train import load_splits, train
from at_extensions.data.split import seeded_generator, to_unit_interval
from at_extensions.experiments import InducedErrors, _perturbed, induced_distribution
from at_extensions.experiments._induced_inputs import open_inputs
from at_extensions.models import create_model, fresh_like, load_model
from at_extensions.runs import OWN_CHECKPOINT, RunDirectory, save_weights
from at_extensions.settings import InducedDistributionSettings, TrainSettings
from at_extensions.untouched import RandomStream

EPS = 0.2
TRAINED = {"data": "digits", "method": "pgd", "eps": EPS, "steps": 1, "epochs": 2, "train_size": 600, "batch_size": 100,
           "model_options": {"width": 4}, "augment": "crop", "val_steps": 1, "keep_every": 1,
           "progress": False}  # fmt: skip
QUICK = {"images": 100, "test_images": 50, "steps": 2, "alpha": 0.2, "net_epochs": 6, "batch_size": 20, "starts": 2,
         "probe": 10, "device": "cpu", "progress": False}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "half", **TRAINED)


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """The folder and the result of a first call."""
    out = tmp_path_factory.mktemp("induced")
    return out, induced_distribution(run, out, zero_start=True, **QUICK)


def inputs_of(run, **options):
    return open_inputs(run, InducedDistributionSettings(**QUICK | options))


def images_of(data):
    return {image.numpy().tobytes() for image in data.images}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("eps", [8 / 255, 0.2])
def test_storage_errs_by_at_most_a_254th_of_eps_and_not_at_the_faces(eps):
    generator = torch.Generator().manual_seed(0)
    images = to_unit_interval(torch.randint(0, 256, (64, 3, 8, 8), generator=generator))
    moves = torch.empty_like(images).uniform_(-1, 1, generator=generator).mul(1.5 * eps)
    low, high = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    perturbed = (images + moves).clamp(low, high)
    codes = _perturbed.encode(images, perturbed, eps)
    back = _perturbed.decode(images, codes, eps)
    assert codes.dtype == torch.int8
    assert (back - perturbed).abs().max() <= eps / 254 + 1e-7
    assert (back - perturbed).abs().max() > eps / 300  # the bound is reached: nothing finer is stored
    saturated = (perturbed == low) | (perturbed == high)
    assert 0.2 < saturated.float().mean() < 0.8
    assert torch.equal(back[saturated], perturbed[saturated])
    assert 0 <= back.min() <= back.max() <= 1


def test_a_and_b_are_disjoint_known_to_the_run_or_not_and_apart_from_validation(run):
    inputs = inputs_of(run, images=None, test_images=None)
    settings = TrainSettings.from_config(run.config())
    trained_on, everything = load_splits(settings), load_splits(replace(settings, train_size=None))
    a, b = inputs.sets["a"], inputs.sets["b"]
    known, validation = images_of(trained_on.train), images_of(trained_on.val)
    twice = len(everything.train) - len(images_of(everything.train))
    assert twice == 0  # so that images tell samples apart
    assert images_of(a) <= known
    assert not images_of(b) & known
    assert not (images_of(a) | images_of(b)) & (validation | images_of(everything.test))
    assert images_of(b) <= images_of(everything.train)
    assert torch.equal(a.labels.bincount(), b.labels.bincount())
    assert len(a) == len(b) > 550
    assert images_of(inputs.sets["test"]) == images_of(everything.test)


def test_a_second_call_measures_nothing_anew_and_a_deleted_file_alone_is_redone(run, first, tmp_path, monkeypatch):
    out, before = tmp_path / "out", first[1]
    shutil.copytree(first[0], out)
    assert [(row.epoch, row.seed) for row in before.rows] == [(1, 0), (2, 0)]
    files = content(out)
    from at_extensions.experiments.induced_distribution import _Experiment

    measured, measure = [], _Experiment.measure
    monkeypatch.setattr(_Experiment, "measure", lambda self, *cell: (measured.append(cell), measure(self, *cell))[1])
    again = induced_distribution(run, out, zero_start=True, **QUICK)
    assert measured == []
    assert again.to_dict() == before.to_dict()
    assert content(out) == files
    (out / "epoch-0002-seed0.json").unlink()
    (out / "clean-seed0.json").unlink()
    again = induced_distribution(run, out, zero_start=True, **QUICK)
    assert measured == [(2, 0)]
    for old, new in zip(before.rows, again.rows):
        assert old.pack() | {"seconds": 0} == new.pack() | {"seconds": 0}


def test_an_error_is_that_of_a_slow_reference(run, first):
    row = first[1].rows[0]
    model = load_model(run.kept()[1]).eval()
    inputs = inputs_of(run)
    draw = lambda stream: seeded_generator(0, stream).initial_seed()  # noqa: E731
    perturbed = {}
    for i, (name, data) in enumerate(inputs.sets.items()):
        clean = data.images.float() / 255
        with RandomStream(draw(4 + i)).on(torch.device("cpu")):
            x = (clean + torch.empty_like(clean).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(2):
            x.requires_grad_(True)
            gradient = torch.autograd.grad(F.cross_entropy(model(x), data.labels), x)[0]
            x = (x.detach() + 0.2 * gradient.sign()).clamp(clean - EPS, clean + EPS).clamp(0, 1)
        stored = (clean + ((x - clean) * (127 / EPS)).round() / 127 * EPS).clamp(0, 1)
        perturbed[name] = torch.where((x <= 0) | (x >= 1), x, stored)
    for name in ("a", "b"):
        net = fresh_like(model, draw(0)).train().to(memory_format=torch.channels_last)  # as the trainer has it
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        order, right = seeded_generator(0, 1), 0
        for _ in range(6):
            right = 0
            for index in torch.randperm(100, generator=order).split(20):
                x, y = perturbed[name][index], inputs.sets[name].labels[index]
                logits = net(x.contiguous(memory_format=torch.channels_last))
                right += (logits.argmax(1) == y).sum().item()
                optimizer.zero_grad()
                F.cross_entropy(logits, y).backward()
                optimizer.step()
                scheduler.step()
        net.eval()
        labels = inputs.sets["test"].labels
        with torch.no_grad():
            correct = net(perturbed["test"]).argmax(1) == labels
            success = (model(perturbed[name]).argmax(1) != inputs.sets[name].labels).double().mean()
        assert correct.double().mean() > 0.3  # three times as good as chance: the training matters
        assert torch.equal(row.nets[name].correct, correct)
        assert row.nets[name].error == pytest.approx(1 - correct.double().mean().item())
        assert row.nets[name].train_accuracy == right / 100
        assert row.success[name] == pytest.approx(success.item())
    assert row.nets["a"].error != row.nets["b"].error


def test_the_zero_start_disperses_nothing_and_the_random_one_what_the_analysis_says(run, first):
    row = first[1].rows[1]
    assert row.dispersion["zero"]["mean"] == 0
    assert set(row.nets) == {"a", "b", "clean", "zero"}
    model, data = load_model(run.kept()[2]).eval(), inputs_of(run).sets["test"]
    x, y = data.batch(torch.randperm(50, generator=seeded_generator(0, 3))[:10], torch.device("cpu"))
    seed = seeded_generator(0, 3).initial_seed()
    found = local_dispersion(model, PGD(model, EPS, 0.2, 2), x, y, starts=2, seed=seed)
    assert row.dispersion["test"]["mean"] == found.mean > 0


def test_differences_gaps_and_the_clean_control_are_what_they_say(run, first):
    out, result = first
    for row, metrics in zip(result.rows, run.metrics()):
        found = row.to_dict()
        assert found["a_minus_b"]["mean"] == pytest.approx(row.nets["a"].error - row.nets["b"].error)
        assert found["b_minus_clean"]["interval"][0] <= found["b_minus_clean"]["mean"]
        assert row.gap == metrics["train_accuracy"] - metrics["val_robust_accuracy"]
        assert InducedErrors.unpack(json.loads(json.dumps(row.pack()))).to_dict() == found
    assert torch.equal(*(row.nets["clean"].correct for row in result.rows))
    assert json.loads((out / "induced_distribution.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert (out / "induced_distribution.png").stat().st_size > 5000
    lines = repr(result).splitlines()
    assert len(lines) == 4
    assert f"{100 * result.rows[0].nets['b'].error:.2f}" in lines[2]


def test_the_run_and_the_global_random_state_are_left_as_they_were(run, tmp_path):
    before, state = content(run.path), torch.get_rng_state()
    induced_distribution(run, tmp_path, epochs=[2], **QUICK)
    assert content(run.path) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_start_from_other_weights_than_the_run_and_one_another(run, tmp_path):
    result = induced_distribution(run, tmp_path, epochs=[2], seeds=[0, 1], exact=True, **QUICK)
    assert [row.seed for row in result.rows] == [0, 1]
    assert not torch.equal(*(row.nets["a"].correct for row in result.rows))
    model = load_model(run.kept()[1])
    nets = [fresh_like(model, seed) for seed in (0, *(seeded_generator(s, 0).initial_seed() for s in (0, 1)))]
    kernels = [net.network.features[0].weight for net in nets]
    assert not any(torch.equal(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_results_of_other_options_weights_or_images_are_refused(run, first):
    out, _ = first
    options = {"zero_start": True, **QUICK}
    with pytest.raises(ValueError, match=r"epoch-0001-seed0.json was measured with net_epochs 6, now it is 3"):
        induced_distribution(run, out, **options | {"net_epochs": 3})
    with pytest.raises(ValueError, match="images"):
        induced_distribution(run, out, **options | {"images": 40})
    with pytest.raises(ValueError, match="zero_start True, now it is False"):
        induced_distribution(run, out, **QUICK)


def test_other_weights_and_damaged_results_are_refused(run, first, tmp_path):
    out, copy = tmp_path / "out", RunDirectory(tmp_path / "run")
    shutil.copytree(first[0], out)
    shutil.copytree(run.path, copy.path)
    shutil.copy(copy.kept()[1], copy.kept_path(2))
    with pytest.raises(ValueError, match=r"epoch-0002-seed0.json was measured with weights"):
        induced_distribution(copy, out, zero_start=True, **QUICK)
    (out / "epoch-0001-seed0.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        induced_distribution(run, out, zero_start=True, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": [1, 7]}, "kept no epoch 7; it kept 1, 2"),
        ({"epochs": []}, "it kept 1, 2"),
        ({"every": 2}, "of which 1 would be used"),
        ({"epochs": [1], "every": 1}, "not both"),
        ({"holdout": 0}, "holdout must lie in"),
        ({"holdout": 1.0}, "holdout must lie in"),
        ({"holdout": 0.7}, "train with --train-size 3"),
        ({"images": 5}, "both need every class"),
        ({"schedule": "stair"}, "schedule"),
        ({"milestones": [1]}, "milestones are for"),
        ({"seeds": [0, 0]}, "once"),
        ({"starts": 1}, "starts"),
        ({"data": "npz:nowhere.npz"}, "the data set of .* is needed again"),
        ({"eps": 8}, "eps"),
        ({"holdouts": 0.5}, "did you mean 'holdout'"),
    ],
)
def test_options_that_cannot_be_right_are_refused_before_any_work(run, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        induced_distribution(run, tmp_path / "out", **QUICK | options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, config: [path.unlink() for path in run.kept().values()], "holds no kept epochs; train with"),
        (lambda run, config: run.kept()[1].unlink(), "kept the epochs 2, of which 1 would be used"),
        (lambda run, config: config["data"].update(train_size=None), "which leaves 0 that it never saw"),
        (lambda run, config: config["data"].update(data_seed=3, train_size=601), "another data set"),
        (lambda run, config: config["data"].update(label_noise=0.1), "label noise"),
        (lambda run, config: config["method"].update(name=OWN_CHECKPOINT), "not on record"),
        (lambda run, config: config.clear(), "is it a run directory"),
        (
            lambda run, config: save_weights(create_model("small_cnn", 10, in_chans=1, width=5), run.kept_path(2)),
            "different architectures: epoch 1 is .* epoch 2 is",
        ),
        (lambda run, config: save_weights(create_model("small_cnn", 10).network, run.kept_path(1)), "no recipe"),
    ],
)
def test_runs_that_cannot_be_used_are_refused(run, tmp_path, change, message):
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    config = copy.config()
    change(copy, config)
    (copy.path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        induced_distribution(copy, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_clean_run_has_no_robust_gap(run, tmp_path):
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    config = copy.config()
    config["method"]["name"] = "standard"
    copy.write_config(config)
    assert inputs_of(copy).gaps == {}
    assert list(inputs_of(run).gaps) == [1, 2]
