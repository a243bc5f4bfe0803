"""A run that is killed at any moment resumes, with the verdicts of an uninterrupted one."""

import subprocess
import sys
from pathlib import Path


def test_verdicts_after_ten_kills_are_those_of_an_uninterrupted_run(tmp_path):
    worker = Path(__file__).with_name("killing_worker.py")  # a process without autograd's threads: it forks
    done = subprocess.run([sys.executable, worker, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
