"""Run by torchrun: two steps of GradAlign over the processes; each saves its gradient and the one by hand."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from toys import a_net

from at_extensions import processes
from at_extensions.methods import FGSMAT, GradAlign


def work() -> None:
    rank, net = dist.get_rank(), a_net()
    net[1] = nn.Tanh()  # BatchNorm would normalise each process's batch apart
    method = GradAlign(FGSMAT(net, eps=0.1, variant="rs", seed=rank), weight=2.0, seed=rank)
    wrapped = DistributedDataParallel(method)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    terms = []
    for number in range(2):
        generator = torch.Generator().manual_seed(2 * number + rank)
        x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (6,), generator=generator)
        alone = copy.deepcopy(method)
        alone(x, y).loss.backward()
        expected = processes.add_over_ranks(torch.cat([p.grad.flatten() for p in alone.model.parameters()])) / 2
        step = wrapped(x, y)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        terms.append(step.terms["grad_align"].item())
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    saved = {"weights": net.state_dict(), "terms": terms, "gradient": gradient, "expected": expected}
    torch.save(saved, f"{sys.argv[1]}/{rank}.pt")


if __name__ == "__main__":
    with processes.connected():
        work()
