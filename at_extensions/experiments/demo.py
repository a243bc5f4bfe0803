"""The demonstration: standard and adversarial training on real scanned digits, attacked and written up."""

from __future__ import annotations

from pathlib import Path

from at_extensions.commands.evaluate import evaluate_run
from at_extensions.commands.train import train
from at_extensions.publishing import write_report, write_run_info
from at_extensions.runs import RunDirectory

EPS = 0.2  # at 8/255 even a standard CNN keeps 93 % of these digits; at 0.2 it keeps next to none


def demo(out: str | Path = "runs/demo", *, epochs: int = 60, seed: int = 0, progress: bool = True) -> Path:
    """Train a small CNN on scikit-learn's digits with and without PGD-AT, attack both with AutoAttack, and report.

    Takes minutes on two CPU cores. Run again, it goes on where it stopped.

    Args:
        out: Folder for the two runs and the report.
        epochs: Passes over the training data of each run.
        seed: Of initial weights, order, augmentation and attacks.
        progress: Show progress bars (on a terminal).

    Returns:
        Path of the report.
    """
    out = Path(out)
    runs = []
    for method, steps in (("standard", None), ("pgd", 10)):
        run = train(
            out / method,
            data="digits",
            model="small_cnn",
            method=method,
            eps=EPS,
            alpha=None if steps is None else EPS / 4,
            steps=steps,
            epochs=epochs,
            batch_size=64,
            lr=0.1,
            augment="crop",
            seed=seed,
            progress=progress,
        )
        evaluate_run(run.path, eps=EPS, seed=seed, progress=progress)
        write_run_info(run)
        runs.append(RunDirectory(run.path))
    return write_report(
        runs,
        out / "report.html",
        title="Standard and adversarial training on scanned digits",
        command=f"at-extensions demo --out {out} --epochs {epochs} --seed {seed}",
    )
