"""Shared by the benchmarks: the machine in words, and the time of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from at_extensions.experiments.machine import load, machine, processor

__all__ = ["load", "machine", "processor", "seconds"]


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
