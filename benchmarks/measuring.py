"""What the benchmarks share: the machine in words, and the time of a piece of work. Scripts beside it import it."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from at_extensions.runs import versions


def machine(device: torch.device | str = "cpu", *packages: str) -> dict:
    """Describe what numbers are measured on: device, cores, threads, load before, system, versions.

    Args:
        device: Where the work runs.
        packages: Beside this package's own, those whose versions matter.
    """
    device = torch.device(device)
    more = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            more[package] = version(package)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": load(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions() | more,
    }


def load() -> float | None:
    """Return how many processes want to run, over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def seconds(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Time a piece of work until the device has finished it."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
