"""The command line: commands do what their functions do, help teaches, errors are one line that says what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from at_extensions.cli import main
from at_extensions.runs import RunDirectory

QUICK = ["--epochs", "1", "--model-options", '{"width": 4}', "--augment", "crop", "--eps", "0.2", "--progress=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quick"
    assert main(["train", str(out), "--method", "n_fgsm", *QUICK]) == 0
    return out


def test_train_then_evaluate_writes_everything_a_user_looks_for(run, capsys):
    arguments = ["--version", "custom", "--attacks", '["apgd-ce"]', "--n-examples", "40", "--progress", "false"]
    assert main(["evaluate", str(run), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "apgd-ce" in printed
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["n_examples"] == 40
    assert evaluation["eps"] == 0.2
    assert 0 <= evaluation["robust_accuracy"] <= evaluation["clean_accuracy"] <= 1
    assert "<html" in (run / "report.html").read_text()
    (info,) = (run / "model_info").rglob("*.json")
    assert json.loads(info.read_text())["eps"] == "0.2"


def test_a_yaml_file_sets_options_and_the_command_line_wins(tmp_path, run):
    settings = {"method": "standard", "epochs": 3, "model_options": {"width": 4}, "augment": "none", "eps": "1/5"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | {"out": str(tmp_path / "run")}))
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--epochs=1"]) == 0
    config = RunDirectory(tmp_path / "run").config()
    assert config["method"]["name"] == "standard"
    assert config["method"]["eps"] == 0.2
    assert config["training"]["epochs"] == 1
    assert config["training"]["augment"] == "none"


def test_switches_need_no_value(tmp_path):
    assert (
        main(["train", str(tmp_path / "run"), "--method", "standard", *QUICK[:-1], "--compile=false", "--resume"]) == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "OUT", "--eps", "8"], "did you mean 8/255"),
        (["train", "OUT", "--method", "pdg"], "did you mean 'pgd'"),
        (["train", "OUT", "--data", "npz:nowhere.npz"], "nowhere.npz"),
        (["evaluate", "OUT"], "holds no checkpoint"),
        (["verify", "OUT"], "OUT"),
        (["leaderboard", "OUT"], "OUT"),
    ],
)
def test_an_error_is_one_line_without_a_traceback(tmp_path, capsys, arguments, message):
    assert main([str(tmp_path / "OUT") if a == "OUT" else a for a in arguments]) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("at-extensions: error: ")
    assert message in printed[-1]


def test_an_unknown_option_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", str(tmp_path), "--bach-size", "3"])
    assert stop.value.code == 2
    assert "bach_size" in capsys.readouterr().err


def test_a_report_of_every_run_in_a_folder(run, capsys):
    assert main(["report", str(run.parent), "--title", "Both"]) == 0
    assert f"report: {run.parent / 'report.html'}" in capsys.readouterr().out
    page = (run.parent / "report.html").read_text()
    assert "<h1>Both</h1>" in page
    assert "quick" in page
    assert main(["report", str(run.parent / "nowhere")]) == 1
    assert "no folder" in capsys.readouterr().err


def test_criticality_of_two_models_in_one_call(run, tmp_path, capsys):
    weights = run / "checkpoints" / "last.safetensors"
    arguments = ["--model", json.dumps([str(run), str(weights)]), "--checkpoint", "[null, null]", "--data", "digits"]
    arguments += ["--n-images", "20", "--trials", "2", "--out", str(tmp_path), "--progress=false"]
    assert main(["analyze", "criticality", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "criticality_heatmap.png" in printed
    assert json.loads((tmp_path / "criticality.json").read_text()).keys() == {"quick", "last"}
    assert main(["analyze", "criticality", "--model", str(run), "--data", "digits", "--reset", "randm"]) == 1
    assert "did you mean 'random'" in capsys.readouterr().err


COMMANDS = [["train"], ["evaluate"], ["report"], ["publish"], ["verify"], ["leaderboard"], ["demo"],
            ["analyze", "criticality"]]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_explains_every_option(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = [line for line in text.splitlines() if line.startswith("  --")]
    assert len(options) > 2
    lines = text.splitlines()
    for i, line in enumerate(lines):  # an option's explanation stands on its line or the next
        if line.startswith("  --") and "config" not in line:
            assert len((line + " " + lines[i + 1]).split("  ")) > 2, line


def test_the_installed_command_runs():
    program = Path(sys.executable).with_name("at-extensions")
    done = subprocess.run([program, "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--imbalance_ratio" in done.stdout
    assert not done.stderr
