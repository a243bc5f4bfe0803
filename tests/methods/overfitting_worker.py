"""Run by torchrun: three steps and an epoch's end of AWP, TRADES and temporal ensembling, on a joint batch of 12."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchattacks.attack import Attack

from at_extensions import processes
from at_extensions.methods import AWP, PGDAT, TRADES, TemporalEnsembling


class Shift(Attack):
    """Moves every pixel alike: a deterministic attack that TRADES takes, since its own needs a random start."""

    def __init__(self, model):
        super().__init__("Shift", model)

    def forward(self, images, labels, loss=None):
        return (images + 0.05).clamp(0, 1)


OPTIONS = {"eps": 0.1, "alpha": 0.05, "steps": 2, "start": "zero"}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 4)).double()


def train(model, method) -> torch.Tensor:
    rank, world = processes.rank(), processes.world_size()
    wrapped = DistributedDataParallel(method) if world > 1 else method
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for part in torch.randperm(36, generator=generator).split(12):
            x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(int(part[0])), dtype=torch.float64)
            y = part % 4
            mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
            step = wrapped(x[mine], y[mine], part[mine])
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
        method.epoch_end()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def work(out: Path) -> None:
    found = {}
    model = net()
    found["awp"] = train(model, AWP(PGDAT(model, **OPTIONS), gamma=0.05))
    model = net()
    found["trades"] = train(model, TRADES(model, attack=Shift(model)))
    model = net()
    method = TemporalEnsembling(PGDAT(model, **OPTIONS), 36, 4, start=1, end=2)
    found["te"] = train(model, method)
    found["table"] = method.table
    if processes.is_main():
        torch.save(found, out / f"{processes.world_size()}.pt")


if __name__ == "__main__":
    with processes.connected():
        work(Path(sys.argv[1]))
        if dist.is_initialized():
            dist.barrier()
