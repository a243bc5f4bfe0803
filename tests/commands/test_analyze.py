"""Criticality of models that are named as on the command line."""

import json

import numpy as np
import pytest
import torch

import at_extensions as atx
from at_extensions.analysis import gradient_instability, layer_criticality, local_dispersion
from at_extensions.attacks import PGD
from at_extensions.commands.analyze import analyze_criticality, analyze_dispersion, analyze_instability
from at_extensions.runs import RunDirectory, save_weights


@pytest.fixture
def data(tmp_path):
    """A file of random images, and two run directories with networks for it."""
    draw = np.random.default_rng(0)
    arrays = {f"{role}_images": draw.integers(0, 256, (24, 8, 8, 3), np.uint8) for role in ("train", "test")}
    arrays |= {f"{role}_labels": np.arange(24) % 3 for role in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays)
    for i in range(2):
        torch.manual_seed(10 + i)
        model = atx.create_model("small_cnn", 3, width=4)
        save_weights(model, RunDirectory(tmp_path / f"run{i}").weights("last"))
    return tmp_path


def test_several_models_in_one_call(data):
    runs = [str(data / "run0"), str(data / "run1")]
    options = {"data": f"npz:{data / 'data.npz'}", "n_examples": 12, "trials": 2, "progress": False, "device": "cpu"}
    results = analyze_criticality(model=runs, out=str(data / "out"), **options)
    assert list(results) == ["run0", "run1"]
    images, labels = atx.load_dataset(options["data"], val_fraction=0.0).test.subset(12, seed=0).tensors()
    for run, found in zip(runs, results.values()):
        model = atx.models.load_model(RunDirectory(run).published_weights())
        assert found.values == layer_criticality(model, images, labels, trials=2).values
    names = {path.name for path in (data / "out").iterdir()}
    pictures = {f"criticality_{kind}.png" for kind in ("depth", "heatmap", "stages", "run1_minus_run0")}
    assert names == pictures | {"criticality.json", "criticality.csv"}
    assert all((data / "out" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_on_adversarial_images(data):
    options = {"data": f"npz:{data / 'data.npz'}", "n_examples": 6, "trials": 1, "progress": False, "device": "cpu"}
    options |= {"model": str(data / "run0"), "out": str(data / "out")}
    attacked = analyze_criticality(attack_eps="16/255", attack_steps=2, **options)["run0"]
    assert attacked.inputs == "PGD"
    assert attacked.values != analyze_criticality(**options)["run0"].values
    with pytest.raises(ValueError, match=r"did you mean 8/255"):
        analyze_criticality(attack_eps=8, **options)


def test_models_are_told_apart_by_their_paths(data):
    for name in ("a", "b"):
        save_weights(atx.create_model("small_cnn", 3, width=4), data / name / "w.safetensors")
    paths = [str(data / name / "w.safetensors") for name in ("a", "b")]
    options = {"data": f"npz:{data / 'data.npz'}", "n_examples": 3, "trials": 1, "progress": False, "device": "cpu"}
    assert list(analyze_criticality(model=paths, out=str(data / "out"), **options)) == paths
    with pytest.raises(ValueError, match="the same model twice"):
        analyze_criticality(model=paths[:1] * 2, out=str(data / "out"), **options)
    with pytest.raises(ValueError, match="1 checkpoints for 2 models"):
        analyze_criticality(model=paths, checkpoint=paths[0], out=str(data / "out"), **options)


def test_images_of_another_shape_and_a_folder_that_cannot_be_written_end_it_before_any_work(data, tmp_path):
    digits = {"model": str(data / "run0"), "data": "digits", "out": str(data / "out"), "device": "cpu"}
    with pytest.raises(ValueError, match="does not take images of 1 x 8 x 8 from digits"):
        analyze_criticality(**digits)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into .*file/out"):
        analyze_criticality(**digits | {"data": f"npz:{data / 'data.npz'}", "out": str(tmp_path / "file" / "out")})


def test_dispersion_is_what_the_function_measures(data):
    options = {"data": f"npz:{data / 'data.npz'}", "n_examples": 6, "progress": False, "device": "cpu"}
    runs = [str(data / "run0"), str(data / "run1")]
    results = analyze_dispersion(
        model=runs, out=str(data / "out"), eps="16/255", starts=3, steps=8, norm="1", **options
    )
    images, labels = atx.load_dataset(options["data"], val_fraction=0.0).test.subset(6, seed=0).tensors()
    for run, found in zip(runs, results.values()):
        model = atx.models.load_model(RunDirectory(run).published_weights())
        direct = local_dispersion(model, PGD(model, 16 / 255, 4 / 255, 8), images, labels, starts=3, norm=1)
        assert torch.equal(found.per_sample, direct.per_sample)
    written = json.loads((data / "out" / "dispersion.json").read_text())
    assert written["models"]["run1"]["mean"] == results["run1"].mean
    assert written["settings"]["starts"] == 3


def test_instability_is_what_the_function_measures(data):
    options = {"data": f"npz:{data / 'data.npz'}", "n_examples": 6, "progress": False, "device": "cpu"}
    found = analyze_instability(
        model=str(data / "run0"), out=str(data / "out"), eps="16/255", method="trades", steps=[0.5, 1], **options
    )["run0"]
    model = atx.models.load_model(RunDirectory(data / "run0").published_weights())
    images, labels = atx.load_dataset(options["data"], val_fraction=0.0).test.subset(6, seed=0).tensors()
    method = atx.create_method("trades", model, eps=16 / 255)
    assert found == gradient_instability(model, method, images, labels, steps=[0.5, 1])
    assert json.loads((data / "out" / "instability.json").read_text())["models"]["run0"] == found.to_dict()
    assert (data / "out" / "instability.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_norms_and_methods_are_refused(data):
    options = {"model": str(data / "run0"), "data": f"npz:{data / 'data.npz'}", "out": str(data / "out")}
    with pytest.raises(ValueError, match="norm"):
        analyze_dispersion(norm="3", **options)
    with pytest.raises(ValueError, match="did you mean 'trades'"):
        analyze_instability(method="trade", device="cpu", progress=False, **options)
