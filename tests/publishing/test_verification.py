"""Verifying a published folder: what passes, and what each change of it is caught by."""

import json
import os
import subprocess

import numpy as np
import pytest
import torch

from at_extensions.data import load_dataset
from at_extensions.evaluation import RobustnessReport, evaluate
from at_extensions.models import create_model, load_model
from at_extensions.publishing import publish, verification, verify
from at_extensions.publishing.submission import CHECKSUMS, checksums
from at_extensions.runs import save_weights

ID = "Sun2023Enhance_CNN"
EPS = 2 / 255


@pytest.fixture
def data(tmp_path):
    """Twenty images in a file."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(20) % 10
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return f"npz:{tmp_path / 'data.npz'}"


@pytest.fixture
def folder(make_trained, paper, tmp_path, data):
    """A model and its real evaluation by one attack, published as if on CIFAR-10."""
    run = make_trained()
    model = load_model(run.weights())
    test = load_dataset(data, val_fraction=0.0).test
    x, _ = test.tensors()
    with torch.no_grad():
        model.network.classifier.bias -= model(x).mean(0)  # untrained, it would say one class of every image
        test.labels = (model(x).argmax(1) + (torch.arange(20) % 4 == 3)) % 10  # every fourth is wrong
    save_weights(model, run.weights())
    path = data.removeprefix("npz:")
    arrays = dict(np.load(path)) | {"test_labels": test.labels.numpy()}
    np.savez(path, **arrays)
    report = evaluate(model, test, eps=EPS, version="custom", attacks=["apgd-ce"], progress=False)
    assert 0 < report.robust_accuracy < report.clean_accuracy == 0.75
    run.write_evaluation(report.to_dict())
    return publish(run, paper, ID, tmp_path / "out", allow_partial=True, allow_other_eps=True)


def rewrite(folder, name, change):
    """Change a JSON of the folder and put the checksums right."""
    path = folder / name
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | change(values)))
    (folder / CHECKSUMS).write_text(checksums(folder))


RESULT = f"model_info/cifar10/Linf/{ID}.json"


def test_what_was_published_verifies_in_a_fresh_process(folder, data):
    found = verify(folder, n_examples=8, data=data, device="cpu")
    assert found.passed, found
    assert [check.name for check in found.checks] == ["files", "result", "clean accuracy", "robust accuracy"]
    assert "8 images" in found.checks[-1].detail
    assert "0 fell that were claimed robust" in found.checks[-1].detail
    assert repr(found).count("pass") == 5
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True


def test_other_weights_are_caught_by_the_numbers(folder, data, monkeypatch):
    torch.manual_seed(5)
    save_weights(create_model("small_cnn", 10, width=4), folder / f"{ID}.safetensors")
    assert [c.name for c in verify(folder, data=data).checks if not c.passed] == ["files"]
    (folder / CHECKSUMS).write_text(checksums(folder))
    monkeypatch.setattr(verification, "_in_fresh_process", lambda task: verification.measure(**task))
    found = verify(folder, n_examples=20, data=data, device="cpu")
    assert [c.passed for c in found.checks][:3] == [True, True, False]
    assert "claimed" in found.checks[2].detail


def test_missing_data_are_said_with_how_to_get_them(folder, tmp_path, monkeypatch):
    def here(command, **_):
        verification.answer(*command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", here)
    with pytest.raises(FileNotFoundError, match="CIFAR10 is missing"):
        verify(folder, root=tmp_path / "nowhere", device="cpu")


def test_data_that_cannot_be_named_are_asked_for(folder, monkeypatch):
    def here(command, **_):
        verification.answer(*command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", here)
    with pytest.raises(ValueError, match="--data folder:PATH"):
        verify(folder, data="imagenet", device="cpu")


def test_a_fresh_process_that_fails_says_why(folder, data, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="MemoryError: none left")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="MemoryError: none left"):
        verify(folder, data=data, device="cpu")


def failures(folder):
    return [(check.name, check.detail) for check in verify(folder).checks if not check.passed]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "README.md").write_text("other"), "README.md has another hash"),
        (lambda f: (f / "README.md").unlink(), "README.md is missing"),
        (lambda f: (f / "more.py").write_text(""), "more.py is not listed"),
        (lambda f: (f / CHECKSUMS).unlink(), "SHA256SUMS is missing"),
        (lambda f: (f / CHECKSUMS).write_text("nonsense"), "a line that is none: 'nonsense'"),
        (lambda f: (f / CHECKSUMS).write_text("0" * 64 + "  ../../secret"), "a line that is none"),
        (lambda f: (f / CHECKSUMS).write_text("0" * 64 + "  /etc/hosts"), "a line that is none"),
    ],
)
def test_changed_files_are_caught(folder, damage, message):
    damage(folder)
    assert failures(folder)[0][0] == "files"
    assert message in failures(folder)[0][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"clean_acc": "99.00"}, "clean_acc 99.00, evaluated"),
        (lambda _: {"autoattack_acc": "99.00"}, "autoattack_acc 99.00, evaluated"),
        (lambda _: {"eps": "4/255"}, "eps 4/255, evaluated 0.00784314"),
        (lambda info: {"unreliable": not info["unreliable"]}, "unreliable"),
        (lambda _: {"clean_acc": 99.0}, "clean_acc must be str"),
        (lambda _: {"dataset": "cifar100"}, "lies under 'cifar10'"),
    ],
)
def test_a_changed_result_is_caught(folder, change, message):
    rewrite(folder, RESULT, change)
    ((name, detail),) = failures(folder)
    assert name == "result"
    assert message in detail


def test_an_evaluation_that_contradicts_itself_is_caught(folder):
    rewrite(folder, "evaluation.json", lambda e: {"robust_accuracy": 1.0, "robust": e["robust"]})
    rewrite(folder, RESULT, lambda _: {"autoattack_acc": "100.00"})
    assert "robust accuracy 1.0000" in dict(failures(folder))["result"]


def test_a_result_without_its_evaluation_is_caught(folder):
    rewrite(folder, "evaluation.json", lambda _: {"unheard": 1})
    assert "unheard" in dict(failures(folder))["result"]
    os.unlink(folder / "evaluation.json")
    (folder / CHECKSUMS).write_text(checksums(folder))
    assert "evaluation.json" in dict(failures(folder))["result"]


def report_of(make_trained, **changes):
    return RobustnessReport.from_dict(make_trained.evaluation(clean=0.9, robust=0.5, n=1000) | changes)


@pytest.mark.parametrize(("fell", "passed"), [(0, True), (2, True), (3, False)])
def test_verdicts_are_compared_image_by_image(make_trained, fell, passed):
    report = report_of(make_trained)
    rows = list(range(450, 550))
    robust = report.robust[rows].clone()
    robust[:fell] = False
    found = {"total": 1000, "right": 900, "indices": rows, "robust": robust.tolist()}
    clean, check = verification.compare(report, found)
    assert clean.passed
    assert check.passed is passed
    assert f"{fell} fell that were claimed robust" in check.detail


def test_a_model_that_is_more_robust_than_claimed_differs_too(make_trained):
    report = report_of(make_trained)
    found = {"total": 1000, "right": 900, "indices": list(range(1000)), "robust": [True] * 900 + [False] * 100}
    assert not verification.compare(report, found)[1].passed


def test_a_partial_claim_is_compared_through_the_interval(make_trained):
    report = report_of(make_trained)
    for kept, passed in ((50, True), (42, True), (30, False), (75, False)):
        robust = [True] * kept + [False] * (100 - kept)
        found = {"total": 2000, "right": 1800, "indices": list(range(100)), "robust": robust}
        clean, check = verification.compare(report, found)
        assert clean.passed
        assert check.passed is passed
    assert not verification.compare(report, found | {"right": 1000})[0].passed


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="n_examples"):
        verify(tmp_path, n_examples=0)
    assert not verify(tmp_path).passed
