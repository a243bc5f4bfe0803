"""Dealing the numbered batches of one evaluation over the processes of ``torchrun``."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

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

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do this process's part of the work and return everyone's."""
        return self.gather(work())


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

    def together(self, work: Callable[[], T]) -> list[T]:
        # a rank that fails says so, or the others would wait for it
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        answers = self.gather((result, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, (_, message) in enumerate(answers):
            if message is not None:
                raise RuntimeError(f"the evaluation failed on rank {rank}: {message}")
        return [answer for answer, _ in answers]


@contextlib.contextmanager
def sharing(shard: bool) -> Iterator[Ranks]:
    """Yield the processes that share the evaluation: all of a torch.distributed job, or this one alone.

    Under ``torchrun`` in a script that never made a process group, one is made for the while.
    """
    started = shard and dist.is_available() and not dist.is_initialized() and _launched_by_torchrun()
    if started:
        dist.init_process_group("gloo")
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


def _launched_by_torchrun() -> bool:
    return dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1
