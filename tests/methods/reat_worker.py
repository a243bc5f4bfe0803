"""Run by torchrun: an epoch of REAT over the processes; each process saves what it predicted and what it ended with."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from at_extensions import processes
from at_extensions.methods import REAT


def work() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    method = REAT(net.double(), [40, 20, 10, 5], eps=0.1, alpha=0.05, steps=2, seed=dist.get_rank())
    wrapped = DistributedDataParallel(method)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    counted = torch.zeros(4, dtype=torch.long)
    for _ in range(3):
        x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
        step = wrapped(x, torch.randint(4, (6,), generator=generator))
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        counted += torch.bincount(step.logits.argmax(1), minlength=4)
    before = method.predicted.clone()
    method.epoch_end()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    state = {"counted": counted, "before": before, "class_weights": method.class_weights, "weights": weights}
    torch.save(state | {"after": method.predicted}, f"{sys.argv[1]}/{dist.get_rank()}.pt")


if __name__ == "__main__":
    with processes.connected():
        work()
