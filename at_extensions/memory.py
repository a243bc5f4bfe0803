"""Keep freed memory in the process, for training and attacks on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed for the next step, and return whether it does.

    By default big tensors go back to the system when they are freed, and their pages are faulted in and zeroed anew in
    the next step: from nothing to 39 % of a training step in ``benchmarks/training_step.py``. Kept, memory stays at its
    peak until the process ends. The commands of ``at-extensions`` call this; in a program of your own, call it before
    the first big tensor.

    Nothing is done, and False returned, where malloc is not glibc's (macOS, Windows, musl) or where the environment
    already says how to allocate (``MALLOC_*``, ``GLIBC_TUNABLES``, ``LD_PRELOAD``). GPU memory is not concerned.
    """
    if platform.libc_ver()[0] != "glibc" or any(
        key.startswith("MALLOC_") or key in ("GLIBC_TUNABLES", "LD_PRELOAD") for key in os.environ
    ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
