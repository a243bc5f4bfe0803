"""Run by torchrun, or alone: a rigged training under the guard; with a mark, it is killed before the first remedy."""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from rigged import STEPS, a_run, robust_accuracy

from at_extensions import processes
from at_extensions.training import CollapseGuard


class Killed(CollapseGuard):
    """Dies between the alarm and the recovery, once."""

    def _treat(self, trainer):
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super()._treat(trainer)


Killed.__name__ = "CollapseGuard"


if __name__ == "__main__":
    torch.set_num_threads(1)
    mark = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    with processes.connected():
        guard = (Killed if mark else CollapseGuard)(action="rollback", remedy=sys.argv[2], window=6)
        trainer, train, val = a_run(guard, after=2 * STEPS + 8, epochs=4, run_dir=Path(sys.argv[1]) / "run")
        trainer.fit(train, val)
        saved = {"weights": trainer.model.state_dict(), "rollbacks": trainer.rollbacks, "applied": guard.applied,
                 "attack": type(trainer.method.attack).__name__, "verdict": guard.verdict.to_dict()}  # fmt: skip
        if processes.world_size() == 1:
            saved["robust"] = robust_accuracy(trainer.model)
        torch.save(saved, Path(sys.argv[1]) / f"{processes.rank()}.pt")
        del trainer
