"""Shared by the benchmarks: the machine in words, and the time of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from at_extensions.experiments.machine import load, machine, processor

__all__ = ["load", "machine", "processor", "seconds"]


def seconds(
    work: Callable[[], object],
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time a piece of work until the device has finished it.

    Args:
        work: What is timed.
        device: Where it runs.
        clock: ``time.process_time`` counts this process's CPU time, for a busy machine.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
