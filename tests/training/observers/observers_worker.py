"""Run by torchrun: a run that is rolled back with a remedy, then one whose observers disagree."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from test_observer import Rolling, weaker
from tiny import a_split, a_trainer

from at_extensions import processes
from at_extensions.data import make_loader


def fit(out, observers):
    trainer, _, _ = a_trainer(3, run_dir=out, observers=observers)
    shared = {"rank": processes.rank(), "world_size": processes.world_size()}
    train = make_loader(a_split(), 8, generator=torch.Generator().manual_seed(1), **shared)
    trainer.fit(train, make_loader(a_split(24, seed=9), 12, shuffle=False, **shared))
    return trainer


if __name__ == "__main__":
    with processes.connected():
        rank, out = processes.rank(), Path(sys.argv[1])
        trainer = fit(out / "run", [Rolling(at_epoch=2, remedy=weaker)])
        saved = {"weights": trainer.model.state_dict(), "rollbacks": trainer.rollbacks,
                 "seed": trainer.method.stream.seed, "attack": trainer.method.attack.eps}  # fmt: skip
        try:
            fit(None, [Rolling(at_epoch=1, never=rank == 1)])
        except RuntimeError as error:
            saved["said"] = str(error)
        torch.save(saved, out / f"{rank}.pt")
        del trainer
