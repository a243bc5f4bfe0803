"""The processes of one job: rank, world size, device, which one prints, gathers and reductions.

Every function also works in a single process.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torch's env:// needs them
_groups = itertools.count()


def launched() -> bool:
    """Whether this process was started as one of several, by ``torchrun`` or in its way."""
    announced = dist.is_available() and all(name in os.environ for name in _RENDEZVOUS)
    return announced and int(os.environ["WORLD_SIZE"]) > 1


def is_grouped() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number in its process group, 0 without one."""
    return dist.get_rank() if is_grouped() else 0


def world_size() -> int:
    """Return the number of processes in the process group, 1 without one."""
    return dist.get_world_size() if is_grouped() else 1


def is_main() -> bool:
    """Whether this process prints, draws progress bars and writes files: the first of its job, grouped or not."""
    return (rank() if is_grouped() or not launched() else int(os.environ["RANK"])) == 0


def own_device() -> torch.device:
    """Return a GPU where there is one: under ``torchrun`` each process's own; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0")) if launched() else torch.cuda.current_device()
    return torch.device("cuda", local % torch.cuda.device_count())


@contextlib.contextmanager
def connected() -> Iterator[torch.device]:
    """Yield this process's device inside the announced process group; leave the group if this call joined it."""
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joins = launched() and not is_grouped()
    if joins:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if joins:
            disconnect()


def disconnect() -> None:
    """Leave the process group, if one was joined.

    A DistributedDataParallel that the garbage collector has not freed keeps the group's threads alive; one of them
    may then meet an interpreter that is shutting down and abort the process.
    """
    if is_grouped():
        gc.collect()
        dist.destroy_process_group()


def add_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """Take the maximum of a tensor over all processes, entry by entry, in place."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather(value: T) -> list[T]:
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
    """Block until every process is here."""
    if world_size() > 1:
        dist.barrier()


class Ranks:
    """A team of processes that share work; this class is a team of one.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of their ranks."""
        return [value]

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """End the block together on every process; if one fails, all fail instead of blocking for ever."""
        yield

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do this process's part of the work and return everyone's results."""
        with self.in_step():
            result = work()
        return self.gather(result)


class _ProcessGroup(Ranks):
    """The processes of a torch.distributed job."""

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # a group of its own: gloo ships objects on every device, and a batch may take longer than NCCL's time-out
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    def gather(self, value: T) -> list[T]:
        values: list = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"the evaluation failed on rank {rank}: {message}")


@contextlib.contextmanager
def sharing(shard: bool) -> Iterator[Ranks]:
    """Yield the team that shares the work: all processes of a torch.distributed job, or this one alone.

    Under ``torchrun`` in a script that never made a process group, one is made for the duration.
    """
    started = shard and launched() and not is_grouped()
    if started:
        _start_group()
    try:
        if not (shard and world_size() > 1):
            yield Ranks()
            return
        ranks = _ProcessGroup()
        try:
            yield ranks
        finally:
            dist.destroy_process_group(ranks.group)
    finally:
        if started:
            dist.destroy_process_group()


def _start_group() -> None:
    """Make a process group, out of the way of any that the script makes later on."""
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun's store outlives a group: under the same keys, a later one would look for the processes of this one
    store = dist.PrefixStore(f"at_extensions.sharing.{next(_groups)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
