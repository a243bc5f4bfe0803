"""Run in a process of its own, which may fork: kills an evaluation ten times and compares what it ends with."""

import importlib.util
import multiprocessing
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from at_extensions.evaluation import evaluate


class Slow(torch.nn.Module):
    """Gives a kill time to come in between."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        time.sleep(5e-4)
        return self.model(x)


def attack(model, x, y, state_dir):
    return evaluate(model, x, y, eps=0.01, batch_size=5, state_dir=state_dir, progress=False)


def ten_kills_at_random_moments(linear, make_images, label, tmp_path):
    model, x = Slow(linear(4)), make_images(40)
    y = label(model, x, wrong=3)
    start = time.perf_counter()
    whole = attack(model, x, y, None)
    length = time.perf_counter() - start
    assert 0 < whole.robust_accuracy < whole.clean_accuracy

    moments, killed, records = random.Random(0), 0, [0]
    while killed < 10:
        child = multiprocessing.get_context("fork").Process(target=attack, args=(model, x, y, tmp_path))
        child.start()
        child.join(moments.uniform(0.02, 0.25) * length)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        records.append(len(list(tmp_path.glob("*/*.safetensors"))))
        assert records == sorted(records)  # what is finished stays
        if child.exitcode == 0:  # it was faster: go on with a new one, when its verdicts are right
            compare(attack(model, x, y, tmp_path), whole)
            shutil.rmtree(tmp_path)
            records = [0]
    compare(attack(model, x, y, tmp_path), whole)


def compare(resumed, whole):
    assert torch.equal(resumed.robust, whole.robust)
    assert torch.equal(resumed.clean, whole.clean)
    assert resumed.after_attack == whole.after_attack
    assert resumed.flags == whole.flags
    assert torch.equal(resumed.examples.adversarial, whole.examples.adversarial)
    assert resumed.per_class == whole.per_class


if __name__ == "__main__":
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("helpers", Path(__file__).with_name("conftest.py"))
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    with pytest.MonkeyPatch.context() as monkeypatch:
        helpers.shrink(monkeypatch)
        ten_kills_at_random_moments(helpers.Linear, helpers.images, helpers.labelled_by, Path(sys.argv[1]))
