"""A run killed at any moment goes on, and ends with the verdicts it would have had."""

import subprocess
import sys
from pathlib import Path


def test_ten_kills_at_random_moments(tmp_path):
    worker = Path(__file__).with_name("killing_worker.py")  # a process without autograd's threads: it forks
    done = subprocess.run([sys.executable, worker, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
