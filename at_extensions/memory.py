"""Keep freed memory in the process, for training and attacks on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Configure glibc's malloc to reuse freed memory instead of returning it to the system.

    By default the memory of a large tensor returns to the system when it is freed, and its pages are faulted in and
    zeroed again in the next step: between 0 and 39 % of a training step in ``benchmarks/training_step.py``. With this
    setting, memory stays at its peak until the process ends. The commands of ``at-extensions`` call this function; in
    your own program, call it before the first large tensor. GPU memory is not affected.

    Returns:
        Whether malloc was configured. False, without any effect, if malloc is not glibc's (macOS, Windows, musl) or if
        the environment already configures allocation (``MALLOC_*``, ``GLIBC_TUNABLES``, ``LD_PRELOAD``).
    """
    if platform.libc_ver()[0] != "glibc" or any(
        key.startswith("MALLOC_") or key in ("GLIBC_TUNABLES", "LD_PRELOAD") for key in os.environ
    ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
