"""Two real processes under torchrun train what one process trains."""

import os
import subprocess
import sys

import distributed_worker
import torch

from at_extensions.runs import RunDirectory, load_tensors


def launch(processes, out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, distributed_worker.__file__, str(out)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_gloo_processes_equal_one_and_resume(tmp_path):
    launch(2, tmp_path / "two")
    with torch.random.fork_rng(devices=[]):
        for epochs in (2, 4):
            distributed_worker.fit(str(tmp_path / "one"), epochs)
    two, one = (load_tensors(RunDirectory(tmp_path / name).weights("last"))[0] for name in ("two", "one"))
    # the network has no BatchNorm and the attack no random start: then the joint batch's gradient is the mean
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-12)
    kept = [RunDirectory(tmp_path / name).kept() for name in ("two", "one")]
    assert list(kept[0]) == list(kept[1]) == [2, 4]
    for epoch in (2, 4):
        two, one = (load_tensors(found[epoch])[0] for found in kept)
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-12)
    metrics = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in RunDirectory(tmp_path / name).metrics()]
        for name in ("two", "one")
    ]
    for a, b in zip(*metrics, strict=True):
        assert a.keys() == b.keys()
        torch.testing.assert_close(torch.tensor(list(a.values())), torch.tensor(list(b.values())))
    streams = RunDirectory(tmp_path / "two").load_state()["streams"]
    assert [s["stream"]["seed"] for s in streams] == [0, 0]  # as given
    assert not torch.equal(*(s["stream"]["states"]["cpu"] for s in streams))
