"""What a training loop needs to know of torch.distributed; every function also works in a single process."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def launched() -> bool:
    """Whether this process was started by ``torchrun`` with more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def connect() -> torch.device:
    """Join the process group that ``torchrun`` announced, if any, and return this process's device."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def disconnect() -> None:
    """Leave the process group, if one was joined.

    A DistributedDataParallel that still waits for the garbage collector keeps the group's threads alive; one of them
    may then meet an interpreter that is shutting down and abort the process.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@contextlib.contextmanager
def connected() -> Iterator[torch.device]:
    """Yield this process's device inside the process group; leave the group afterwards if this call joined it."""
    joined = not dist.is_initialized()
    try:
        yield connect()
    finally:
        if joined:
            disconnect()


def rank() -> int:
    """Return this process's number, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and draws progress bars."""
    return rank() == 0


def add_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: object) -> list:
    """Return every process's value, in order of rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first: BatchNorm's running statistics drift apart within a step."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()
