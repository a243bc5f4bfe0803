"""Evaluation of a run directory: its own test split, a state for each setting, and models that nothing is left of."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from at_extensions import create_model
from at_extensions.commands.evaluate import evaluate_run
from at_extensions.commands.train import train
from at_extensions.runs import RunDirectory, load_tensors, save_weights


@pytest.fixture
def run(tmp_path):
    """An untrained network that always says 3: a tenth of the digits is right, and stays right."""
    model = create_model("small_cnn", 10, in_chans=1, width=2)
    with torch.no_grad():
        model.network.classifier.weight.zero_()
        model.network.classifier.bias.copy_(torch.eye(10)[3])
    directory = RunDirectory(tmp_path / "run")
    save_weights(model, directory.weights("last"))
    directory.write_config({"data": {"name": "digits"}, "method": {"name": "pgd", "eps": 0.2}})
    return directory


def test_a_constant_model_keeps_its_one_class(run):
    report = evaluate_run(run.path, version="custom", attacks=["apgd-ce"], progress=False)
    assert report.n_examples == 355
    assert report.robust_accuracy == report.clean_accuracy == pytest.approx(0.1, abs=0.02)
    assert [row["class"] for row in report.per_class if row["robust"]] == [3]
    assert run.evaluation()["eps"] == 0.2


def test_a_model_that_is_right_on_nothing_is_reported_and_not_stumbled_over(run, tmp_path):
    import numpy as np

    images, labels = np.zeros((6, 8, 8, 1), np.uint8), np.array([0, 1, 2, 0, 1, 2])
    many = {"train_images": np.zeros((10, 8, 8, 1), np.uint8), "train_labels": np.arange(10)}
    np.savez(tmp_path / "wrong.npz", test_images=images, test_labels=labels, **many)
    report = evaluate_run(run.path, data=f"npz:{tmp_path / 'wrong.npz'}", progress=False)  # the whole standard suite
    assert report.clean_accuracy == report.robust_accuracy == 0
    assert set(report.after_attack.values()) == {0.0}


def test_other_settings_and_other_weights_have_a_state_of_their_own(run):
    quick = {"version": "custom", "attacks": ["apgd-ce"], "progress": False}
    first = evaluate_run(run.path, eps=0.1, n_examples=30, **quick)
    assert evaluate_run(run.path, eps=0.3, n_examples=20, **quick).n_examples == 20
    weights = load_tensors(run.weights("last"))[0]
    model = create_model("small_cnn", 10, in_chans=1, width=2)
    weights["network.classifier.bias"] = torch.eye(10)[4]
    model.load_state_dict(weights)
    save_weights(model, run.weights("last"))
    other = evaluate_run(run.path, eps=0.1, n_examples=30, **quick)
    assert other.indices == first.indices
    assert [row["class"] for row in other.per_class if row["robust"]] == [4]


def test_images_with_injected_features_are_not_evaluated_unnoticed(run):
    data = {"name": "digits", "inject_beta": 0.1, "inject_mode": "add", "inject_permuted": False, "inject_seed": 0}
    run.write_config(run.config() | {"data": data})
    with pytest.raises(ValueError, match=r"injected features and leave .* give --data digits"):
        evaluate_run(run.path)
    quick = {"version": "custom", "attacks": ["apgd-ce"], "n_examples": 10, "progress": False}
    assert evaluate_run(run.path, data="digits", **quick).n_examples == 10


def test_what_is_missing_is_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="is it a run directory"):
        evaluate_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="did you mean 'best'"):
        evaluate_run(run.path, checkpoint="bset")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        evaluate_run(run.path, checkpoint="best")


def test_data_of_another_shape_devices_and_closed_folders_are_named_before_any_work(run, tmp_path):
    import numpy as np

    arrays = {f"{role}_images": np.zeros((20, 8, 8, 3), np.uint8) for role in ("train", "test")}
    np.savez(tmp_path / "rgb.npz", **arrays, train_labels=np.arange(20) % 10, test_labels=np.arange(20) % 10)
    with pytest.raises(ValueError, match="does not take images of 3 x 8 x 8 from npz:"):
        evaluate_run(run.path, data=f"npz:{tmp_path / 'rgb.npz'}")
    with pytest.raises(ValueError, match="unknown device 'cuba'; did you mean 'cuda'"):
        evaluate_run(run.path, device="cuba")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device 'cuda' cannot be used here .*; try cpu"):
            evaluate_run(run.path, device="cuda")
    with pytest.raises(ValueError, match="device 'meta' cannot be used here"):
        evaluate_run(run.path, device="meta")
    assert not (run.path / "evaluation_state").exists()


def test_a_log_file_gets_a_line_an_attack(run, capfd):
    evaluate_run(run.path, version="custom", attacks="apgd-ce,square", n_examples=20)
    lines = [line for line in capfd.readouterr().err.splitlines() if "batches" in line]
    assert [line.split(" ")[0] for line in lines] == ["apgd-ce", "square"]
    assert all("% robust accuracy" in line for line in lines)


def test_under_torchrun_one_process_writes_what_a_single_one_would(tmp_path):
    run = train(tmp_path / "run", data="digits", epochs=1, model_options={"width": 4}, eps=0.2, method="n_fgsm")
    options = ["--version", "custom", "--attacks", '["apgd-ce"]', "--n-examples", "40", "--batch-size", "8"]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "at_extensions.cli", "evaluate", str(run.path), *options, "--device", "cpu"],
        capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1
    shared = run.evaluation()
    shutil.rmtree(run.path / "evaluation_state")
    alone = evaluate_run(
        run.path, version="custom", attacks=["apgd-ce"], n_examples=40, batch_size=8, device="cpu", progress=False
    )
    assert shared["robust"] == alone.robust.tolist()
    assert shared["data"] == alone.data
    assert shared["weights"] == alone.weights
