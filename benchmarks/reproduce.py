"""Accuracy studies on real data: trains and attacks every arm of a study, and writes one JSON a finished run.

    python benchmarks/reproduce.py baseline --data npz:cifar10.npz --scale cpu
    python benchmarks/reproduce.py reat --data npz:cifar10.npz --scale gpu --seeds 0 1 2

A study grows over days: what is finished is skipped, what was interrupted goes on where it was. Runs (checkpoints,
metrics) go to --runs; results go to --results/<study>-<scale>/<arm>-seed<seed>.json, small enough to commit.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from at_extensions.attacks import PGD
from at_extensions.data import load_dataset
from at_extensions.evaluation import count_correct, evaluate
from at_extensions.models import load_model
from at_extensions.runs import RunDirectory, versions, write_json
from at_extensions.training import train

EPS = 8 / 255


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: options of ``training.train`` beside the study's common ones."""

    options: dict
    only_first_seed_attacked: bool = True


@dataclass(frozen=True)
class Study:
    """A question, its arms, and what every arm shares at a scale."""

    question: str
    arms: dict[str, Arm]
    common: dict[str, dict]
    seeds: tuple[int, ...] = (0, 1, 2)
    autoattack: dict[str, int | None] = field(default_factory=lambda: {"cpu": 500, "gpu": None})
    pgd20: bool = True


CPU_NET = {"model": "cifar_resnet18", "model_options": {"width": 16}, "precision": "bf16"}
GPU_NET = {"model": "preact_resnet18", "precision": "bf16"}

STUDIES = {
    "baseline": Study(
        question="How robust is the plain N-FGSM baseline of this package on CIFAR-10?",
        arms={
            "n_fgsm": Arm({"method": "n_fgsm"}),
            "n_fgsm_wrn": Arm({"method": "n_fgsm", "model": "wide_resnet_10_2", "model_options": None, "epochs": 10}),
        },
        common={
            "cpu": CPU_NET | {"epochs": 24, "lr": 0.2, "warmup": 0.3, "val_fraction": 0.02},
            "gpu": GPU_NET | {"epochs": 30, "lr": 0.2, "warmup": 0.3, "val_fraction": 0.02},
        },
        seeds=(0,),
    ),
    "strength": Study(
        question="Networks of one architecture, trained clean and at growing eps, for measurements of the model.",
        arms={
            "standard": Arm({"method": "standard"}),
            "eps2": Arm({"method": "n_fgsm", "eps": 2 / 255}),
            "eps4": Arm({"method": "n_fgsm", "eps": 4 / 255}),
            "eps8": Arm({"method": "n_fgsm", "eps": 8 / 255}),
        },
        common={
            "cpu": CPU_NET | {"epochs": 12, "lr": 0.2, "warmup": 0.3, "val_fraction": 0.02},
            "gpu": GPU_NET | {"epochs": 30, "lr": 0.2, "warmup": 0.3, "val_fraction": 0.02},
        },
        seeds=(0,),
        autoattack={"cpu": 0, "gpu": 0},
    ),
}


def run_arm(study: str, arm: str, seed: int, args: argparse.Namespace) -> Path:
    """Train and attack one arm with one seed; return its result file."""
    out = args.results / f"{study}-{args.scale}" / f"{arm}-seed{seed}.json"
    if out.exists():
        return out
    plan, started = STUDIES[study], time.time()
    options = plan.common[args.scale] | plan.arms[arm].options
    run = train(
        args.runs / f"{study}-{args.scale}" / f"{arm}-seed{seed}", data=args.data, eps=EPS, seed=seed, **options
    )
    result = {
        "study": study,
        "question": plan.question,
        "arm": arm,
        "seed": seed,
        "scale": args.scale,
        "command": f"python benchmarks/reproduce.py {study} --data {args.data} --scale {args.scale} --arms {arm} "
        f"--seeds {seed}",
        "options": options,
        "epochs": run.metrics(),
        "training_seconds": sum(row["seconds"] + row.get("val_seconds", 0.0) for row in run.metrics()),
    }
    first = seed == args.seeds[0] or not plan.arms[arm].only_first_seed_attacked
    result |= measure(run, plan, args, options["eps"], attacked=first and plan.autoattack[args.scale] != 0)
    result |= {"versions": versions(), "machine": machine(), "wall_seconds": time.time() - started}
    write_json(out, result)
    return out


def measure(run: RunDirectory, plan: Study, args: argparse.Namespace, eps: float, *, attacked: bool) -> dict:
    """Clean and PGD-20 accuracy on all test images for the best and the last epoch; AutoAttack on the best."""
    trained = run.config()["data"]
    test = load_dataset(args.data, val_fraction=0.0).test
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict = {}
    for kind in ("best", "last"):
        if not run.weights(kind).is_file():
            continue
        model = load_model(run.weights(kind)).to(device)
        result[kind] = {"clean": share(count_correct(model, test, batch_size=250))}
        if plan.pgd20:
            attack = PGD(model, eps, eps / 4, 20)
            result[kind]["pgd20"] = share(count_correct(model, test, attack=attack, batch_size=250))
    if attacked:
        result["autoattack"] = evaluate(
            load_model(run.published_weights()).to(device),
            test if plan.autoattack[args.scale] is None else test.subset(plan.autoattack[args.scale]),
            eps=eps,
            state_dir=run.path / "autoattack_state",
            class_counts=trained["class_counts"] if trained["imbalance_ratio"] else None,
        ).to_dict()
    return result


def share(counts: torch.Tensor) -> dict:
    """Correct, of how many, and their ratio."""
    right, total = counts.tolist()
    return {"correct": right, "images": total, "accuracy": right / total}


def machine() -> dict:
    """Return what the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES, help="; ".join(f"{k}: {s.question}" for k, s in STUDIES.items()))
    parser.add_argument("--data", default="npz:cifar10.npz", help="CIFAR-10, as at-extensions train takes it")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the study's own")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    study = STUDIES[args.study]
    args.seeds = args.seeds or list(study.seeds)
    for seed in args.seeds:  # seed by seed, so that an unfinished study is already paired
        for arm in args.arms or study.arms:
            print(run_arm(args.study, arm, seed, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
