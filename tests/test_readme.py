"""README: every fenced block runs in a fresh folder or says why not, and its table names every method."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import at_extensions as atx

README = Path(__file__).parent.parent / "README.md"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: (.+) -->\n\Z")
NETS = """
from torch import nn


def build(num_classes=10):
    layers = nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes)
    return nn.Sequential(*layers)
"""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    excuse: str | None  # the reason of a comment just before it


def blocks(page):
    """Return the fenced blocks of a page in order."""
    found = []
    for match in FENCE.finditer(page):
        mark = MARK.search(page[: match.start()])
        found.append(Block(match[1], match[2], mark and mark[1]))
    assert len(found) * 2 == len(re.findall(r"^```", page, re.MULTILINE)), "a fence is not closed"
    return found


def commands(text):
    """Return the commands of a shell block, with continued lines joined and comments dropped."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def run(command, folder):
    """Run a command in a folder and return its output; it must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_shell(text, folder):
    """Run every command of a shell block with the package under test."""
    for command in commands(text):
        name, _, words = command.partition(" ")
        assert name == "at-extensions", f"no way to run {command!r}"
        program = f'"$0" -m at_extensions.cli {words}'
        run(["sh", "-c", program, sys.executable], folder)


def users_files(folder):
    """Write what a user brings: a network's code, its weights, and tiny data in CIFAR-10's form."""
    (folder / "my_nets.py").write_text(NETS)
    namespace = {}
    exec(NETS, namespace)
    torch.manual_seed(0)
    torch.save(namespace["build"]().state_dict(), folder / "mine.pt")
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(10)
    arrays = {
        f"{split}_{name}": a for split in ("train", "test") for name, a in (("images", images), ("labels", labels))
    }
    np.savez(folder / "cifar10.npz", **arrays)


BLOCKS = blocks(README.read_text(encoding="utf-8"))


def test_only_make_and_pip_are_excused():
    excused = [command for block in BLOCKS if block.excuse for command in commands(block.text)]
    assert excused
    assert [command for command in excused if not command.startswith(("make ", "pip install "))] == []
    assert {block.language for block in BLOCKS} == {"", "python"}


def test_every_command_runs(tmp_path):
    users_files(tmp_path)
    for block in BLOCKS:
        if block.language == "" and not block.excuse:
            run_shell(block.text, tmp_path)
    assert (tmp_path / "runs/mine/report.html").exists()
    assert (tmp_path / "Doe2026Digits").is_dir()
    assert (tmp_path / "runs/leaderboard.html").exists()


def test_the_python_blocks_run_in_order(tmp_path):
    (tmp_path / "readme.py").write_text("\n".join(b.text for b in BLOCKS if b.language == "python"), encoding="utf-8")
    assert "RobustnessReport: Linf eps 0.2" in run([sys.executable, "readme.py"], tmp_path)


def test_the_table_names_every_method():
    cells = re.findall(r"^\| (`[^|]+`) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(atx.list_methods())


def test_relative_links_lead_to_files():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_the_page_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_a_block_is_found_with_its_excuse_and_its_commands():
    page = "<!-- not run: why -->\n```\nmake x  # y\n```\n\n```python\nx = 1\n```\n"
    page += "<!-- not run: far -->\n\n```\na \\\n  b\nc\n```\n"
    first, second, third = blocks(page)
    assert (first.excuse, second.excuse, third.excuse) == ("why", None, None)
    assert commands(first.text) == ["make x"]
    assert (second.language, second.text) == ("python", "x = 1\n")
    assert commands(third.text) == ["a    b", "c"]
    with pytest.raises(AssertionError, match="not closed"):
        blocks(page + "```\nnever closed\n")


def test_a_failing_command_fails_the_test(tmp_path):
    with pytest.raises(AssertionError, match="unknown option"):
        run_shell("at-extensions train runs/x --no-such-option 1\n", tmp_path)
    with pytest.raises(AssertionError, match="no way to run"):
        run_shell("rm -r x\n", tmp_path)
