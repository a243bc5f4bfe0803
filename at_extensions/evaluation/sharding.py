"""Dealing the numbered batches of one evaluation over the processes of ``torchrun``."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """One process alone: what the others would be told, it tells itself.

    Attributes:
        rank: Number of this process.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of their ranks."""
        return [value]

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Wait for every process to end the block; if one fails, all do, rather than wait for it for ever."""
        yield

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do this process's part of the work and return everyone's."""
        with self.in_step():
            result = work()
        return self.gather(result)


class _ProcessGroup(Ranks):
    """The processes of a torch.distributed job."""

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # a group of its own: gloo ships objects whatever the devices are, and a batch may take longer than NCCL waits
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
    """Yield the processes that share the evaluation: all of a torch.distributed job, or this one alone.

    Under ``torchrun`` in a script that never made a process group, one is made for the while.
    """
    started = shard and dist.is_available() and not dist.is_initialized() and _launched_by_torchrun()
    if started:
        _start_group()
    try:
        if not (shard and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
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
    store = dist.PrefixStore(f"at_extensions.evaluation.{next(_groups)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


_groups = itertools.count()


def own_rank() -> int:
    """Return this process's number in the job that ``torchrun`` started, inside a process group or not."""
    return int(os.environ.get("RANK", "0")) if _launched_by_torchrun() else 0


def own_device() -> torch.device:
    """Return a GPU where there is one: under ``torchrun`` each process's own; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0")) if _launched_by_torchrun() else torch.cuda.current_device()
    return torch.device("cuda", local % torch.cuda.device_count())


def _launched_by_torchrun() -> bool:
    return dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1
