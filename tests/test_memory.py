"""Freed memory is reused by the process: fewer page faults, and a user's own settings are respected."""

import os
import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS = """
import resource, torch
from at_extensions import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.full((16 * 2**20,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
given_back = faults()
assert keep_freed_memory()
faults()
print(faults(), given_back)
"""


def python(code, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=clean | environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not GLIBC, reason="malloc is not glibc's")
def test_reused_memory_is_not_faulted_in_again():
    kept, given_back = map(int, python(FAULTS).split())
    assert kept < 100
    assert given_back > 10 * max(kept, 1)  # 64 MB in pages of 4 kB, or of 2 MB where the system has huge ones


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_allocation_settings_in_the_environment_are_respected(name):
    value = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2", "LD_PRELOAD": ""}.get(name, "2")
    code = "from at_extensions import keep_freed_memory; print(keep_freed_memory())"
    assert python(code, **{name: value}) == "False"


def test_without_such_settings_glibcs_malloc_is_configured():
    assert python("from at_extensions import keep_freed_memory; print(keep_freed_memory())") == str(GLIBC)


def test_other_c_libraries_are_not_configured(monkeypatch):
    from at_extensions import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed_memory() is False
