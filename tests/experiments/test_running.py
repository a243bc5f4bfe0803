"""Running a study: resuming, crashes, changed and damaged results, and processes that share the work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from at_extensions.experiments import Arm, Study, run_study
from at_extensions.experiments import running as module


def learning_rate(run, cell):
    return {"lr": cell.options["lr"], "seed_used": float(run.config()["seed"])}


@pytest.fixture
def trained(monkeypatch):
    """Replace training by a record of its calls; a method named ``crash`` raises."""
    calls = []

    class Run:
        def __init__(self, out):
            self.path = out

        def metrics(self):
            return [{"epoch": 1, "seconds": 1.5, "val_seconds": 0.5, "train_accuracy": 0.5}]

        def config(self):
            return {"seed": calls[-1][1]["seed"]}

    def train(out, **options):
        calls.append((Path(out), options))
        if options.get("method") == "crash":
            raise FloatingPointError("the loss is not finite")
        return Run(out)

    monkeypatch.setattr(module, "train", train)
    return calls


def two_arms(**more):
    arms = {"slow": Arm({"lr": 0.1}), "fast": Arm({"lr": 0.3})}
    return Study("Which?", **({"arms": arms, "measure": learning_rate, "pairs": [("fast", "slow")]} | more))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": ["slow", "fsat"]}, "did you mean 'fast'"),
        ({"arms": []}, "at least one arm"),
        ({"arms": ["slow", "slow"]}, "each once"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 1]}, "once"),
        ({"scale": "gpu"}, "unknown scale"),
        ({"local": {"lr": 0.1}}, "unknown local option"),
        ({"threads": 0}, "threads"),
    ],
)
def test_a_request_that_cannot_be_right_is_refused(trained, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        run_study(two_arms(), tmp_path, **change)
    assert trained == []


def test_a_study_with_scales_needs_one(trained, tmp_path):
    study = two_arms(scales={"small": {"epochs": 1}, "large": {"epochs": 100}}, common={"epochs": 5, "steps": 3})
    with pytest.raises(ValueError, match="small, large"):
        run_study(study, tmp_path)
    run_study(study, tmp_path, scale="large", arms=["fast"], seeds=[4])
    assert trained[0][1] == {"epochs": 100, "steps": 3, "lr": 0.3, "seed": 4}
    assert json.loads((tmp_path / "fast-seed4.json").read_text())["scale"] == "large"


def test_finished_cells_are_skipped(trained, tmp_path):
    run_study(two_arms(), tmp_path, seeds=[0])
    first = (tmp_path / "slow-seed0.json").read_bytes()
    progress = run_study(two_arms(), tmp_path, seeds=[0, 1])
    assert [(out.name, options["seed"]) for out, options in trained] == [
        ("slow-seed0", 0), ("fast-seed0", 0), ("slow-seed1", 1), ("fast-seed1", 1),
    ]  # fmt: skip
    assert (tmp_path / "slow-seed0.json").read_bytes() == first
    assert len(progress.finished) == 4
    assert progress.summary.differences["fast - slow"]["lr"].mean == pytest.approx(0.2)


def test_a_result_holds_the_study_the_options_and_the_measurement(trained, tmp_path):
    run_study(two_arms(name="rates"), tmp_path, runs=tmp_path / "elsewhere", arms=["slow"], seeds=[2],
              local={"data": "npz:here.npz"}, command="python mine.py --arms {arm} --seeds {seed}")  # fmt: skip
    row = json.loads((tmp_path / "slow-seed2.json").read_text())
    assert trained == [(tmp_path / "elsewhere" / "slow-seed2", {"lr": 0.1, "seed": 2, "data": "npz:here.npz"})]
    assert row["options"] == {"lr": 0.1}
    assert (row["study"], row["question"], row["arm"], row["seed"]) == ("rates", "Which?", "slow", 2)
    assert row["command"] == "python mine.py --arms slow --seeds 2"
    assert row["training_seconds"] == 2.0
    assert row["seed_used"] == 2.0
    assert row["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_crash_in_one_arm_leaves_the_others_and_is_tried_again(trained, tmp_path):
    study = two_arms(arms={"bad": Arm({"method": "crash"}), "good": Arm({"lr": 0.1})}, pairs=())
    for _ in range(2):
        with pytest.warns(UserWarning, match="bad-seed0 failed .*not finite"):
            progress = run_study(study, tmp_path, seeds=[0])
        assert list(progress.failed) == ["bad-seed0"]
        assert [path.name for path in progress.finished] == ["good-seed0.json"]
        assert "FloatingPointError" in (tmp_path / "bad-seed0.failed.txt").read_text()
        assert json.loads((tmp_path / "summary.json").read_text())["failed"] == ["bad-seed0"]
    assert [out.name for out, _ in trained] == ["bad-seed0", "good-seed0", "bad-seed0"]
    mended = two_arms(arms={"bad": Arm({"lr": 0.2}), "good": Arm({"lr": 0.1})}, pairs=())
    assert run_study(mended, tmp_path, seeds=[0]).failed == {}
    assert not (tmp_path / "bad-seed0.failed.txt").exists()
    assert "failed" not in json.loads((tmp_path / "summary.json").read_text())


def test_an_interrupt_is_no_failure_of_the_cell(trained, tmp_path):
    def stop(run, cell):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(two_arms(measure=stop), tmp_path)
    assert not list(tmp_path.glob("*-seed*"))
    assert run_study(two_arms(), tmp_path, seeds=[0]).busy == []


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        (None, "must return a dict"),
        ({"epochs": 3}, "the study itself records"),
        ({"robust": float("nan")}, "nan for 'robust'"),
        ({"last": {"clean": {"accuracy": float("inf")}}}, "inf for 'last/clean'"),
        ({"x": torch.ones(1)}, "numbers, texts, lists and dicts"),
    ],
)
def test_a_measurement_that_cannot_be_kept_fails_its_cell(trained, tmp_path, measured, words):
    with pytest.warns(UserWarning, match=words):
        progress = run_study(two_arms(measure=lambda run, cell: measured), tmp_path, arms=["slow"], seeds=[0])
    assert words in progress.failed["slow-seed0"]
    assert progress.summary is None
    assert not (tmp_path / "slow-seed0.json").exists()


def test_a_result_of_other_options_is_refused(trained, tmp_path):
    run_study(two_arms(), tmp_path, seeds=[0])
    changed = two_arms(arms={"slow": Arm({"lr": 0.2}), "fast": Arm({"lr": 0.3})})
    with pytest.raises(ValueError, match=r"slow-seed0.json was measured with lr 0.1, the study now has 0.2"):
        run_study(changed, tmp_path)
    assert len(trained) == 2


def test_a_damaged_result_is_told_before_anything_runs(trained, tmp_path):
    (tmp_path / "fast-seed0.json").write_text('{"arm": "fa')
    with pytest.raises(ValueError, match=r"fast-seed0.json is damaged .* move it away"):
        run_study(two_arms(), tmp_path)
    assert trained == []


def test_threads_are_set_for_the_cells_alone(trained, tmp_path):
    before, inside = torch.get_num_threads(), []
    study = two_arms(measure=lambda run, cell: {"threads_seen": inside.append(torch.get_num_threads()) or 1})
    run_study(study, tmp_path, seeds=[0], threads=before + 1)
    assert inside == [before + 1] * 2
    assert torch.get_num_threads() == before


def test_a_start_under_torchrun_is_refused(trained, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="without torchrun"):
        run_study(two_arms(), tmp_path)


SHARER = """
import sys, time
from pathlib import Path
from at_extensions.experiments import Arm, Study, run_study
from at_extensions.experiments import running as module

folder = Path(sys.argv[1])

class Run:
    def metrics(self): return []

def train(out, **options):
    with open(folder / "calls.txt", "a") as file:
        file.write(f"{Path(out).name}\\n")
    while sys.argv[2] == "hang" or not (folder / "go").exists():
        time.sleep(0.01)
    return Run()

module.train = train
study = Study("?", arms={"a": Arm({}), "b": Arm({})}, seeds=(0, 1), measure=lambda run, cell: {"value": 1.0})
progress = run_study(study, folder / "results")
print(len(progress.finished), progress.busy)
"""


def start(folder, mode):
    return subprocess.Popen([sys.executable, "-c", SHARER, str(folder), mode], stdout=subprocess.PIPE, text=True)


def until_begun(folder, count):
    calls = folder / "calls.txt"
    for _ in range(6000):
        if calls.exists() and len(calls.read_text().split()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"fewer than {count} cells were begun")


def test_two_processes_never_run_the_same_cell(tmp_path):
    processes = [start(tmp_path, "share") for _ in range(2)]
    until_begun(tmp_path, 2)
    (tmp_path / "go").touch()
    for process in processes:
        assert process.communicate(timeout=120)
        assert process.returncode == 0
    calls = (tmp_path / "calls.txt").read_text().split()
    assert sorted(calls) == ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["means"] == {"a": {"value": 1.0}, "b": {"value": 1.0}}


def test_the_cell_of_a_killed_process_is_free_again(tmp_path):
    killed = start(tmp_path, "hang")
    until_begun(tmp_path, 1)
    (tmp_path / "go").touch()
    beside = start(tmp_path, "share")
    assert "3 ['a-seed0']" in beside.communicate(timeout=120)[0]
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    after = start(tmp_path, "share")
    assert "4 []" in after.communicate(timeout=120)[0]
    assert (tmp_path / "calls.txt").read_text().split().count("a-seed0") == 2
