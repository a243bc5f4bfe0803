"""Run directories: whole files whatever happens, and clear words about damaged ones."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from at_extensions import models, runs
from at_extensions.models import create_model
from at_extensions.runs import RunDirectory, find_runs
from at_extensions.weights import load_weights

# A process that imports once, then at each line it reads starts a child that writes two files over and over.
WRITERS = """
import os, sys, time, torch
from at_extensions import runs
run = runs.RunDirectory(sys.argv[1])
for line in sys.stdin:
    child, i, end = os.fork(), 0, time.monotonic() + 120
    if not child:
        while time.monotonic() < end:  # so that none is left behind should the test be killed itself
            i += 1
            runs.save_tensors(run.weights("last"), {"w": torch.full((1 << 18,), float(i))}, {"i": str(i)})
            run.save_state({"w": torch.full((1 << 18,), float(i)), "i": i})
            run.write_metrics([{"i": i, "of": 5000}] * 5000)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def assert_whole(run):
    """Every file is one that was written in one piece."""
    tensors, metadata = runs.load_tensors(run.weights("last"))
    assert torch.equal(tensors["w"], torch.full((1 << 18,), float(metadata["i"])))
    state = run.load_state()
    assert torch.equal(state["w"], torch.full((1 << 18,), float(state["i"])))
    rows = run.metrics()
    assert len(rows) == 5000
    assert all(row == rows[0] for row in rows)
    return int(metadata["i"]), state["i"], rows[0]["i"]


def test_a_kill_at_any_moment_leaves_old_files_or_new_ones_whole(tmp_path):
    run, moments = RunDirectory(tmp_path), random.Random(0)
    command = [sys.executable, "-W", "ignore", "-c", WRITERS, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seen = set()
    writers = subprocess.Popen(
        command, stdin=-1, stdout=-1, text=True, bufsize=1, env=environment, start_new_session=True
    )
    try:
        for _ in range(10):
            began = time.time_ns()
            writers.stdin.write("write\n")
            child = int(writers.stdout.readline())
            metrics = tmp_path / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_mtime_ns > began):
                time.sleep(0.002)
            seen.add(assert_whole(run))  # read while it is written
            time.sleep(moments.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert writers.stdout.readline() == "dead\n"
            seen.add(assert_whole(run))
    finally:
        os.killpg(writers.pid, signal.SIGKILL)
        writers.communicate()
    assert len(seen) > 1


def test_tensors_and_metadata_are_of_one_file_though_it_be_replaced(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    for number in (1, 2):
        runs.save_tensors(tmp_path / str(number), {"w": torch.full((4,), float(number))}, {"i": str(number)})
    os.replace(tmp_path / "1", path)
    from_file = torch.UntypedStorage.from_file

    def opening(name, *args, **kwargs):  # what safe_open does after it has read the header
        os.replace(tmp_path / "2", path)
        return from_file(name, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", opening)
    tensors, metadata = runs.load_tensors(path)
    assert torch.equal(tensors["w"], torch.full((4,), float(metadata["i"])))


def test_a_block_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = runs.write_text(tmp_path / "deep" / "file.txt", "old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyError

    with pytest.raises(KeyError), runs.atomic(path) as temporary:
        fail(temporary)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_config({"a": 1})
    run.write_metrics([{"a": 1}])
    run.save_state({"a": 1})
    writers = (
        run.write_config,
        lambda data: run.write_metrics([data]),
        lambda data: runs.write_json(tmp_path / "x", data),
    )
    for write in writers:
        with pytest.raises((TypeError, yaml.YAMLError)):
            write({"a": object()})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        run.save_state({"a": lambda: 1})
    assert (run.config(), run.metrics(), run.load_state()) == ({"a": 1}, [{"a": 1}], {"a": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.state.pt"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_readable_by_whom_the_user_lets_read(tmp_path, umask, monkeypatch):
    monkeypatch.setattr(runs, "_UMASK", umask)
    assert runs.write_text(tmp_path / "file", "x").stat().st_mode & 0o777 == 0o666 & ~umask


def test_tensors_of_every_layout_come_back_equal(tmp_path):
    base = torch.arange(48.0).view(1, 3, 4, 4)
    tensors = {
        "view": base[:, 1],
        "same": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 3),
        "scalar": torch.tensor(7),
        "half": base.bfloat16(),
        "flags": base > 3,
        "graph": base.clone().requires_grad_() * 2,
        "empty": torch.zeros(0, 3),
    }
    runs.save_tensors(tmp_path / "t.safetensors", tensors, {"note": "é"})
    found, metadata = runs.load_tensors(tmp_path / "t.safetensors")
    assert metadata == {"note": "é"}
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


@pytest.fixture
def net():
    return create_model("small_cnn", 3, width=2)


@pytest.fixture
def weights(tmp_path):
    return runs.save_weights(create_model("small_cnn", 3, width=2), tmp_path / "weights.safetensors")


@pytest.mark.parametrize("part", [0.0, 0.0005, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_told_and_changes_nothing(untouched, net, weights, part):
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(part * len(whole))])
    for read in (
        lambda: load_weights(net, weights),
        lambda: runs.read_recipe(weights),
        lambda: models.load_model(weights),
    ):
        with untouched(net), pytest.raises(ValueError, match=r"weights\.safetensors is truncated or not a safetensors"):
            read()


def test_a_foreign_checkpoint_is_told_and_changes_nothing(untouched, net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "page.html").write_text("<html>404</html>")
    for name, says in (("weights.safetensors", "truncated or not a safetensors file"), ("page.html", "is damaged")):
        with untouched(net), pytest.raises(ValueError, match=says):
            load_weights(net, tmp_path / name)
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with untouched(net), pytest.raises(FileNotFoundError, match="no checkpoint"):
            load_weights(net, missing)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            lambda: create_model("small_cnn", 3, width=4),
            r"tensors \d+ of another shape \(network.features.0.weight: \(4, 3",
        ),
        (lambda: create_model("small_cnn", 5, width=2), "2 of another shape"),
        (
            lambda: nn.Linear(2, 2),
            r"tensors \d+ missing \(mean, std, .*, \.\.\.\), 2 unknown \((weight|bias), (weight|bias)\)",
        ),
    ],
)
def test_a_checkpoint_of_another_architecture_is_told_and_changes_nothing(untouched, net, tmp_path, other, says):
    path = runs.save_weights(other(), tmp_path / "other.safetensors")
    with untouched(net), pytest.raises(ValueError, match="a checkpoint of another architecture.*" + says):
        load_weights(net, path)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (None, r"names no recipe; build the model yourself and use at_extensions\.load_weights"),
        ("resnet18", "holds no recipe of this package but 'resnet18'"),
        ("[1, 2]", "holds no recipe of this package"),
        ('{"name": "nonesuch", "num_classes": 3}', "unknown model 'nonesuch'"),
        ('{"num_classes": 3}', "not a recipe of create_model"),
        ('{"name": "test_vit", "num_classes": 3, "checkpoint_path": "x.pth"}', "not where weights come from"),
    ],
)
def test_a_header_without_a_recipe_of_ours_is_told(tmp_path, header, says):
    metadata = {"format": "pt"} | ({} if header is None else {"recipe": header})
    save_file({"w": torch.zeros(2)}, tmp_path / "theirs.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=says):
        models.load_model(tmp_path / "theirs.safetensors")


def test_weights_of_a_users_own_model_go_round_without_a_recipe(tmp_path, small_net, batch):
    path = runs.save_weights(small_net(1), tmp_path / "own.safetensors")
    net = small_net(2, train=False)
    load_weights(net, path)
    assert runs.read_recipe(path) is None
    assert torch.equal(net(batch(3)[0]), small_net(1, train=False)(batch(3)[0]))


def test_tied_weights_go_round(tmp_path):
    def tied():
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        b.weight = a.weight
        return nn.Sequential(a, b)

    first, second = tied(), tied()
    load_weights(second, runs.save_weights(first, tmp_path / "tied.safetensors"))
    assert torch.equal(second[0].weight, first[1].weight)
    assert second[0].weight is second[1].weight


def test_an_empty_run_says_so(tmp_path):
    run = RunDirectory(tmp_path / "none")
    found = run.config(), run.metrics(), run.load_state(), run.evaluation(), run.examples()
    assert found == ({}, [], None, None, None)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; is it a run directory"):
        run.published_weights()
    with pytest.raises(ValueError, match="unknown checkpoint 'bst'; did you mean 'best'"):
        run.weights("bst")
    assert not run.path.exists()


def test_everything_written_comes_back(tmp_path):
    run = RunDirectory(str(tmp_path / "run"))
    config = {"method": {"name": "pgd", "eps": 8 / 255}, "ünicode": ["ü", None, True], "after": 1}
    run.write_config(config)
    rows = [{"epoch": 1, "loss": 0.1 + 0.2, "note": "a\u2028b\nc"}, {"epoch": 2, "loss": 1e-300}]
    run.write_metrics(rows)
    state = {"epoch": 2, "tensor": torch.arange(3), "nested": [{"lr": 0.1, "betas": (0.9, 0.99), "none": None}]}
    run.save_state(state)
    run.write_evaluation({"robust_accuracy": 0.5}, {"images": torch.rand(2, 3)})
    again = RunDirectory(run.path)
    assert list(again.config()) == list(config)
    assert again.config() == config
    assert again.metrics() == rows
    loaded = again.load_state()
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert loaded == state
    assert again.evaluation() == {"robust_accuracy": 0.5}
    assert again.examples()["images"].shape == (2, 3)


def test_the_best_weights_are_published_and_the_last_where_there_are_none(tmp_path, net):
    run = RunDirectory(tmp_path)
    runs.save_weights(net, run.weights("last"))
    assert run.published_weights() == run.weights("last")
    runs.save_weights(net, run.weights("best"))
    assert run.published_weights() == run.weights("best") == run.weights()
    assert run.state_path().name == "last.state.pt"


@pytest.mark.parametrize("cut", ['{"epoch": 3, "lo', "{", "12", '{"epoch": 3, "loss": 0.5', "\x00\x00"])
def test_a_last_line_that_was_cut_short_is_dropped(tmp_path, cut):
    run = RunDirectory(tmp_path)
    run.write_metrics([{"epoch": 1}, {"epoch": 2}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    assert run.metrics() == [{"epoch": 1}, {"epoch": 2}]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 1}\r\n\n{"epoch": 2}')
    assert RunDirectory(tmp_path).metrics() == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("line", [b'{"epoch": 2, "lo', b"17", b"\xff\xfe"])
def test_a_damaged_line_in_the_middle_is_told(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n' + line + b'\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 "):
        RunDirectory(tmp_path).metrics()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.yaml", b"a: [1", "cannot be read"),
        ("config.yaml", b"- 1\n- 2\n", "does not hold a mapping"),
        ("config.yaml", b"!!python/object/apply:os.system ['exit 3']", "cannot be read"),
        ("config.yaml", b"\xff\xfe\xff", "cannot be read"),
        ("evaluation.json", b'{"a": ', "cannot be read"),
        ("evaluation.json", b"[]", "does not hold a mapping"),
    ],
)
def test_damaged_text_is_told_with_its_file(tmp_path, file, content, says):
    (tmp_path / file).write_bytes(content)
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match=f"{file} {says}"):
        run.config() if file == "config.yaml" else run.evaluation()


class Code:
    """Runs code when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_state_that_holds_code_is_refused_and_its_code_not_run(tmp_path):
    run = RunDirectory(tmp_path)
    run.state_path().parent.mkdir()
    trace = tmp_path / "trace"
    torch.save({"epoch": Code(trace)}, run.state_path())
    for content in (run.state_path().read_bytes(), pickle.dumps(Code(trace))):
        run.state_path().write_bytes(content)
        with pytest.raises(
            ValueError, match=r"last\.state\.pt is truncated or foreign; delete it to start this run anew"
        ):
            run.load_state()
        assert not trace.exists()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_state_is_told(tmp_path, part):
    run = RunDirectory(tmp_path)
    run.save_state({"w": torch.rand(100)})
    whole = run.state_path().read_bytes()
    run.state_path().write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match="truncated or foreign"):
        run.load_state()


def test_versions_are_those_that_are_installed():
    found = runs.versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert {"at-extensions", "torchattacks", "timm", "robustbench", "pyautoattack"} <= found.keys()
    json.dumps(found)


def test_runs_are_found_at_any_depth(tmp_path):
    for name in ("b", "a/inner"):
        run = RunDirectory(tmp_path / name)
        run.write_config({})
        run.write_metrics([{"epoch": 1}])
    (tmp_path / "no_run").mkdir()
    (tmp_path / "no_run" / "config.yaml").write_text("{}")
    assert [run.path for run in find_runs(tmp_path)] == [tmp_path / "a" / "inner", tmp_path / "b"]
    assert [run.path for run in find_runs(tmp_path / "b")] == [tmp_path / "b"]
    with pytest.raises(FileNotFoundError, match="holds no run directory"):
        find_runs(tmp_path / "no_run")
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_runs(tmp_path / "nowhere")
