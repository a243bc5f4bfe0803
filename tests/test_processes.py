"""Two processes find exactly what one finds, and neither waits for one that failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from at_extensions import processes
from at_extensions.evaluation import RobustnessReport, evaluate
from at_extensions.processes import Ranks, sharing

SCRIPT = """
import json, os, sys
import torch
from at_extensions.evaluation import evaluate

torch.set_num_threads(1)
out, tensors = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
rank, x, y = int(os.environ["RANK"]), tensors["x"], tensors["y"]
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 4))
model[1].load_state_dict(tensors["linear"])
options = dict(eps=0.02, version="custom", attacks=["apgd-ce", "fab-t"], batch_size=4, progress=False)

report = evaluate(model, x, y, state_dir=f"{out}/state", **options)  # makes a process group, for the while
report.save(f"{out}/rank{rank}.json")
torch.save(report.examples.to_dict(), f"{out}/rank{rank}.pt")
assert not torch.distributed.is_initialized()

torch.distributed.init_process_group("gloo")
resumed = evaluate(model, x, y, state_dir=f"{out}/state", **options)  # in a group that is there, from the state
alone = evaluate(model, x[: 5 + rank], y[: 5 + rank], shard=False, **options)  # each for itself
outcomes = {"resumed": resumed.robust.tolist() == report.robust.tolist(), "alone": alone.n_examples}

def failing(images, calls=[]):
    calls.append(1)
    if rank == 1 and len(calls) > 20:
        raise RuntimeError("out of luck")
    return torch.nn.Sequential.forward(model, images)

def outcome(data, **changes):
    try:
        evaluate(model, data, y, **{**options, **changes})
    except Exception as error:
        return f"{type(error).__name__}: {error}"

outcomes["other data"] = outcome(x if rank == 0 else x.flip(0))
outcomes["other seed"] = outcome(x, seed=rank)
model.forward = failing
outcomes["failure"] = outcome(x)
json.dump(outcomes, open(f"{out}/outcomes{rank}.json", "w"))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """Run the script on two processes; return its folder, the model and the data."""
    out = tmp_path_factory.mktemp("sharded")
    generator = torch.Generator().manual_seed(0)
    x = 0.25 + 0.5 * torch.rand(37, 3, 5, 5, generator=generator)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 4))
    model[1].weight.data = torch.randn(4, 75, generator=generator) / 8
    model[1].bias.data = -model[1].weight.data.sum(1) / 2
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    torch.save({"x": x, "y": y, "linear": model[1].state_dict()}, out / "tensors.pt")
    (out / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, str(out / "script.py"), str(out), str(out / "tensors.pt")],
        capture_output=True, text=True, timeout=100, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out, model, x, y


def test_two_processes_find_what_one_finds(torchrun):
    out, model, x, y = torchrun
    single = evaluate(model, x, y, eps=0.02, version="custom", attacks=["apgd-ce", "fab-t"], batch_size=4)
    assert 0 < single.robust_accuracy < single.clean_accuracy
    for rank in (0, 1):
        report = RobustnessReport.load(out / f"rank{rank}.json")
        assert torch.equal(report.robust, single.robust)
        assert torch.equal(report.clean, single.clean)
        assert report.after_attack == single.after_attack
        assert report.per_class == single.per_class
        assert report.flags == single.flags
        examples = torch.load(out / f"rank{rank}.pt", weights_only=True)
        assert torch.equal(examples["adversarial"], single.examples.adversarial)
        assert torch.equal(examples["images"], single.examples.images)


def test_a_state_goes_on_with_another_number_of_processes(torchrun):
    out, model, x, y = torchrun
    options = {"eps": 0.02, "version": "custom", "attacks": ["apgd-ce", "fab-t"], "batch_size": 4}
    resumed = evaluate(model, x, y, state_dir=out / "state", **options)
    assert torch.equal(resumed.robust, RobustnessReport.load(out / "rank0.json").robust)
    assert resumed.attack_seconds == RobustnessReport.load(out / "rank1.json").attack_seconds  # nothing was run again


def test_each_process_says_what_went_wrong(torchrun):
    out = torchrun[0]
    first, second = (json.loads((out / f"outcomes{rank}.json").read_text()) for rank in (0, 1))
    assert first["resumed"]
    assert second["resumed"]
    assert (first["alone"], second["alone"]) == (5, 6)
    assert "changed between two reads" in first["other data"]
    assert "changed between two reads" in second["other data"]
    assert "rank 0 and rank 1 evaluate different things: seed" in first["other seed"]
    assert "rank 1 and rank 0 evaluate different things: seed" in second["other seed"]
    assert second["failure"] == "RuntimeError: out of luck"
    assert first["failure"] == "RuntimeError: the evaluation failed on rank 1: RuntimeError: out of luck"


def test_one_process_alone():
    with sharing(True) as ranks:
        assert type(ranks) is Ranks
        assert ranks.gather(3) == [3]
        assert ranks.together(lambda: 4) == [4]


@pytest.mark.parametrize(("rank", "device"), [(None, "cuda:3"), (1, "cuda:1"), (5, "cuda:1")])
def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch, rank, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(processes, "launched", lambda: rank is not None)
    monkeypatch.setenv("LOCAL_RANK", str(rank or 0))
    assert processes.own_device() == torch.device(device)
