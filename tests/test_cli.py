"""The command line: commands do what their functions do, help teaches, errors are one line that says what to do."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from at_extensions.cli import COMMANDS, main
from at_extensions.runs import RunDirectory

QUICK = ["--epochs", "1", "--model-options", '{"width": 4}', "--augment", "crop", "--eps", "0.2", "--progress=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quick"
    assert main(["train", str(out), "--method", "n_fgsm", *QUICK]) == 0
    return out


def test_train_then_evaluate_writes_everything_a_user_looks_for(run, capsys):
    arguments = ["--version", "custom", "--attacks", "apgd-ce", "--n-examples", "40", "--progress", "false"]
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
    assert "unknown option '--bach-size'; did you mean '--batch-size'" in capsys.readouterr().err


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
    arguments = ["--model", f"{run},{weights}", "--checkpoint", "[null, null]", "--data", "digits"]
    arguments += ["--n_examples", "20", "--trials", "2", "--out", str(tmp_path), "--progress=false"]
    assert main(["analyze", "criticality", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "criticality_heatmap.png" in printed
    assert json.loads((tmp_path / "criticality.json").read_text()).keys() == {"quick", "last"}
    assert main(["analyze", "criticality", "--model", str(run), "--data", "digits", "--reset", "randm"]) == 1
    assert "did you mean 'random'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name.split() for name in COMMANDS], ids=" ".join)
def test_help_explains_every_option(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = [line for line in text.splitlines() if line.startswith("  --")]
    assert len(options) > 2
    lines = text.splitlines()
    for i, line in enumerate(lines):  # an option's explanation is on its line or the next
        if line.startswith("  --") and "config" not in line:
            assert len((line + " " + lines[i + 1]).split("  ")) > 2, line


def test_no_command_shows_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "criticality" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["evalute", "run"])
    assert stop.value.code == 2
    assert "'evaluate'" in capsys.readouterr().err


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Return a runner of shell commands in a fresh folder, in this process; it returns what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(command):
        capsys.readouterr()
        program, *words = shlex.split(command)
        assert program == "at-extensions"
        status = main(words)
        printed = capsys.readouterr()
        assert status == 0, f"{command}\n{printed.out}\n{printed.err}"
        return printed.out

    return run


@pytest.fixture
def example(capsys):
    """Return a reader of the example at the end of a command's --help."""

    def read(command):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        head, last = capsys.readouterr().out.rstrip().splitlines()[-2:]
        assert head == "example:"
        return last.strip()

    return read


def test_the_examples_of_help_run_one_after_the_other(shell, example):
    for name in COMMANDS.keys() - {"demo"}:
        assert example(name).startswith(f"at-extensions {name}")
    for name in (
        "train",
        "evaluate",
        "report",
        "publish",
        "verify",
        "leaderboard",
        "analyze criticality",
        "analyze dispersion",
        "analyze instability",
        "experiment feature-injection",
        "experiment random-labels",
    ):
        shell(example(name))
    half = example("train").replace("runs/digits", "runs/half").replace("--epochs 5", "--epochs 2")
    shell(f"{half} --keep-every 1 --train-size 600")
    shell(example("experiment induced-distribution"))
    assert "ntk.json" in shell(example("analyze ntk"))
    assert example("analyze") == example("analyze criticality")
    assert example("") == example("demo")


def test_the_example_of_the_demo_runs(shell, example, tmp_path):
    assert "report: runs/demo/report.html" in shell(example("demo"))
    shown = [RunDirectory(tmp_path / "runs" / "demo" / name).examples()["images"] for name in ("clean", "pgd")]
    assert len(shown[0])
    assert torch.equal(*shown)
    page = (tmp_path / "runs" / "demo" / "report.html").read_text()
    words = re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", page, flags=re.S)
    assert "clean keeps" in words
    assert "standard keeps" not in words


def test_next_lines_run_as_printed_on_a_data_set_of_ones_own(shell, tmp_path):
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 3
    arrays = {f"{role}_images": draw.integers(0, 256, (60, 8, 8, 3), np.uint8) for role in ("train", "test")}
    np.savez(tmp_path / "my own-set.npz", train_labels=labels, test_labels=labels, **arrays)
    command = "at-extensions train 'my run' --data 'npz:my own-set.npz' --epochs 1 --method n_fgsm --batch-size 16"
    for _ in range(3):
        command = re.search(r"^next: (.*)$", shell(command), re.MULTILINE)[1]
    assert command.startswith("at-extensions verify")
    assert "--data 'npz:my own-set.npz'" in command
    assert "FAIL" not in shell(command)


def _interruptible():
    """Undo what a shell does to its background jobs, which ignore SIGINT and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interruption_says_so_and_the_same_command_goes_on(tmp_path):
    run = RunDirectory(tmp_path / "run")
    words = ["train", str(run.path), "--epochs", "400", "--method", "n_fgsm", *QUICK[2:-1], "--val-steps=1"]
    command = [sys.executable, "-W", "ignore", "-m", "at_extensions.cli", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_interruptible
    )
    end = time.monotonic() + 200
    while not len(run.metrics()) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert errors.rstrip().endswith("at-extensions: interrupted; the same command goes on")
    assert "Traceback" not in errors
    before = run.metrics()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(run.metrics()) <= len(before) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    after = run.metrics()
    assert len(after) > len(before) > 0
    assert after[: len(before)] == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train FILE/run --epochs 1", "cannot write into FILE/run"),
        ("evaluate RUN --device cuba", "did you mean 'cuda'"),
        ("evaluate RUN --device cuda", "device 'cuda' cannot be used here"),
        ("evaluate RUN --data npz:RGB", "does not take images of 3 x 8 x 8"),
        ("verify RUN --device cuda", "device 'cuda' cannot be used here"),
        ("report RUN --out FILE/page.html", "FILE"),
        ("analyze criticality --model RUN --data digits --device cuda", "device 'cuda' cannot be used here"),
        ("analyze criticality --model RUN --data digits --out FILE/out", "cannot write into FILE/out"),
        ("analyze criticality --model RUN --data npz:RGB", "does not take images of 3 x 8 x 8"),
        ("experiment random-labels --out FILE/out", "cannot write into FILE/out"),
        ("experiment random-labels --rates 0,1.5 --out OUT", "noise rate must"),
        ("experiment random-labels --methods pgd,tradse --out OUT", "did you mean 'trades'"),
        ("demo --out FILE/demo", "cannot write into FILE/demo"),
        ("train --epochs 1", "out is missing"),
        ("train OUT --config FILE", "does not hold a mapping"),
        ("train OUT --epochs many", "epochs must be a whole number, got 'many'"),
    ],
)
def test_a_bad_input_is_one_line_without_a_traceback(run, tmp_path, capsys, command, message):
    if "--device cuda" in command and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arrays = {f"{role}_images": np.zeros((20, 8, 8, 3), np.uint8) for role in ("train", "test")}
    np.savez(tmp_path / "rgb.npz", **arrays, train_labels=np.arange(20) % 10, test_labels=np.arange(20) % 10)
    (tmp_path / "file").write_text("")
    places = {"FILE": tmp_path / "file", "RUN": run, "RGB": tmp_path / "rgb.npz", "OUT": tmp_path / "out"}
    for word, place in places.items():
        command, message = command.replace(word, str(place)), message.replace(word, str(place))
    assert main(command.split()) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("at-extensions: error: ")
    assert message in printed[-1]


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(tmp_path):
    words = ["train", "run", "--method", "standard", *QUICK[:-1]]
    code = (
        "import resource, sys; from at_extensions.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        f"sys.exit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]


def test_settings_are_printed_as_a_file_that_gives_them_back(tmp_path, capsys):
    assert main(["train", "run", "--preset", "deat", "--epochs", "7", "--print-config"]) == 0
    (tmp_path / "settings.yaml").write_text(capsys.readouterr().out)
    assert main(["train", "run", "--config", str(tmp_path / "settings.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "settings.yaml").read_text()
    assert yaml.safe_load((tmp_path / "settings.yaml").read_text())["epochs"] == 7


def test_the_config_of_a_run_trains_it_again(run, tmp_path):
    assert main(["train", str(tmp_path / "again"), "--config", str(run / "config.yaml"), "--progress=false"]) == 0
    assert RunDirectory(tmp_path / "again").config() == RunDirectory(run).config()


def test_the_installed_command_runs():
    program = Path(sys.executable).with_name("at-extensions")
    done = subprocess.run([program, "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--imbalance-ratio" in done.stdout
    assert not done.stderr
