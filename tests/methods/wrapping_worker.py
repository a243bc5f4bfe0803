"""Run by torchrun: an epoch of a thrice wrapped REAT over the processes; each saves what it saw and ended with."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from toys import Penalised, Shaken, Visits, a_net

from at_extensions import processes
from at_extensions.methods import REAT


def work() -> None:
    rank, net = dist.get_rank(), a_net()
    reat = REAT(net, [40, 20, 10, 5], eps=0.1, alpha=0.05, steps=2, seed=rank)
    method = Visits(Shaken(Penalised(reat), seed=rank), 12)
    wrapped = DistributedDataParallel(method)
    assert sum(p.numel() for p in wrapped.parameters()) == sum(p.numel() for p in net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    seen = torch.zeros(12, dtype=torch.long)
    for _ in range(3):
        x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
        index = torch.randperm(12, generator=generator)[:6]
        step = wrapped(x, torch.randint(4, (6,), generator=generator), index)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        seen[index] += 1
    before = {"visits": method.visits.clone(), "predicted": reat.predicted.clone()}
    method.epoch_end()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    after = {"visits": method.visits, "predicted": reat.predicted, "class_weights": reat.class_weights}
    torch.save({"seen": seen, "before": before, "after": after, "weights": weights}, f"{sys.argv[1]}/{rank}.pt")


if __name__ == "__main__":
    with processes.connected():
        work()
