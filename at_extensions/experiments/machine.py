"""A description of the machine on which something is measured."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from at_extensions.runs import versions


def machine(device: torch.device | str = "cpu", *packages: str) -> dict:
    """Describe the machine: device, cores, threads, load before the measurement, system, versions.

    Args:
        device: Where the work runs.
        packages: Beside this package's own dependencies, those whose versions matter.
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
    """Return the average number of running processes over the last minute, or None where the system keeps none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
