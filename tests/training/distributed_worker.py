"""Run by torchrun: four epochs in two halves, the second one resumed, on a network without BatchNorm in float64."""

import sys

import torch
from torch import nn

from at_extensions import processes
from at_extensions.attacks import PGD
from at_extensions.data import ImageSplit, make_loader
from at_extensions.methods import PGDAT
from at_extensions.training import Trainer, create_optimizer, create_scheduler


class Float64(nn.Module):
    """Computes in float64 on float32 batches, so that only the order of sums differs between layouts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()

    def forward(self, x):
        return self.net(x.double())


def fit(out: str, epochs: int) -> None:
    labels = torch.arange(50) % 3  # 50: the last step of an epoch is not full
    images = torch.randint(0, 255, (50, 1, 8, 8), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    world, rank, model = processes.world_size(), processes.rank(), Float64()
    options = {"rank": rank, "world_size": world}
    train = make_loader(
        ImageSplit(images, labels, 3), 16 // world, augment="crop", drop_last=True,
        generator=torch.Generator().manual_seed(1), **options,
    )  # fmt: skip
    val = make_loader(ImageSplit(images[:20], labels[:20], 3), 20 // world, shuffle=False, **options)
    optimizer = create_optimizer(model, "sgd", lr=0.05)
    scheduler = create_scheduler(optimizer, "cosine", epochs=4, steps_per_epoch=len(train))
    method = PGDAT(model, eps=0.1, alpha=0.05, steps=2, start="zero")
    trainer = Trainer(
        method, optimizer, epochs=epochs, scheduler=scheduler, run_dir=out, keep_every=2,
        val_attack=lambda m: PGD(m, 0.1, 0.05, 2, start="zero"),
    )  # fmt: skip
    trainer.fit(train, val)


if __name__ == "__main__":
    with processes.connected():
        fit(sys.argv[1], 2)
        fit(sys.argv[1], 4)
