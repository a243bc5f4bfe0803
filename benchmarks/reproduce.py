"""Accuracy studies on real data: trains and attacks every arm of a study, and writes one JSON a finished run.

    python benchmarks/reproduce.py baseline --data npz:cifar10.npz --scale cpu
    python benchmarks/reproduce.py reat --data npz:cifar10.npz --scale gpu --seeds 0 1 2

A study grows over days: what is finished is skipped, what was interrupted goes on where it was. Runs (checkpoints,
metrics) go to --runs; results go to --results/<study>-<scale>/<arm>-seed<seed>.json, small enough to commit. Where a
study compares arms, summary.json beside them holds their paired differences over the seeds. Several processes may
share a study: give each its own --arms or --seeds, and with --threads its share of the cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from scipy.stats import t
from torch import nn

from at_extensions.attacks import PGD
from at_extensions.checks import check_name
from at_extensions.commands.train import train
from at_extensions.data import load_dataset
from at_extensions.data.split import LabelledSplit
from at_extensions.evaluation import count_correct, evaluate
from at_extensions.evaluation.accuracy import count_correct_by_class
from at_extensions.memory import keep_freed_memory
from at_extensions.models import load_model
from at_extensions.publishing import figures, sweep_plots
from at_extensions.publishing.sweeps import is_sweep, rank_correlations, sweep_point
from at_extensions.runs import RunDirectory, write_json
from at_extensions.training.metrics import by_frequency
from measuring import machine

EPS = 8 / 255


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: options of ``training.train`` beside the study's common ones."""

    options: dict
    only_first_seed_attacked: bool = True


@dataclass(frozen=True)
class Study:
    """A question, its arms, and what every arm shares at a scale.

    Attributes:
        ablations: Arms that only run when they are named by --arms.
        pairs: Arms and what each is compared with, seed by seed: (arm, reference).
        precision: In which AutoAttack searches, by scale; verdicts are fp32's.
    """

    question: str
    arms: dict[str, Arm]
    common: dict[str, dict]
    seeds: tuple[int, ...] = (0, 1, 2)
    autoattack: dict[str, int | None] = field(default_factory=lambda: {"cpu": 500, "gpu": None})
    pgd20: bool = True
    ablations: dict[str, Arm] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    precision: dict[str, str] = field(default_factory=lambda: {"cpu": "fp32", "gpu": "fp32"})


CPU_NET = {"model": "cifar_resnet18", "model_options": {"width": 16}, "precision": "bf16"}
SMALL_NET = CPU_NET | {"model_options": {"width": 8}}
GPU_NET = {"model": "preact_resnet18", "precision": "bf16"}
LONG_TAIL = {"imbalance_ratio": 0.02, "val_fraction": 0.02}


def reat_arm(**method_options) -> Arm:
    return Arm({"method": "reat", "method_options": method_options})


REAT_FORMS = (
    "reat_released",
    "reat_pairwise_logit",
    "reat_pairwise",
    "reat_pairwise_logit_0.1",
    "reat_logit_no_tail",
)

# DEAT: at equal nominal rates, and at the rates that give equal effective ones (analysis.diffusion.matched_lr)
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.0},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "deat": {"optimizer": "deat"},
}
RATES, EFFECTIVE_RATES = (0.1, 0.3), (0.3, 1.0)
EFFECTIVE = {"sgd": 1.0, "momentum": 0.1, "deat": 5**0.5}  # nominal rate of each at an effective rate of 1
NOMINAL = [(name, lr) for lr in RATES for name in OPTIMIZERS]
MATCHED = [(name, lr * EFFECTIVE[name]) for lr in EFFECTIVE_RATES for name in OPTIMIZERS]

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
    "reat": Study(
        question="On CIFAR-10-LT (0.02) with a balanced test set: is released REAT more than AT with balanced softmax, "
        "and is the form that its paper intends?",
        arms={
            "at": Arm({"method": "pgd"}),
            "at_bsl": Arm({"method": "at_bsl"}),
            "reat_released": reat_arm(variant="released", attack_weighting="loss"),
            "reat_pairwise_logit": reat_arm(variant="pairwise", attack_weighting="logit"),
        },
        ablations={
            "reat_pairwise": reat_arm(variant="pairwise", attack_weighting="loss"),
            "reat_pairwise_logit_0.1": reat_arm(variant="pairwise", attack_weighting="logit", tail_weight=0.1),
            "reat_logit_no_tail": reat_arm(variant="pairwise", attack_weighting="logit", tail_weight=0.0),
            "at_bsl_class_eps": Arm({"method": "at_bsl", "method_options": {"class_eps": 0.3}}),
        },
        common={
            "cpu": SMALL_NET
            | LONG_TAIL
            | {"steps": 3, "alpha": 4 / 255, "epochs": 12, "lr": 0.2, "warmup": 0.3, "val_steps": 5},
            "gpu": GPU_NET
            | LONG_TAIL
            | {"steps": 10, "alpha": 2 / 255, "epochs": 80, "lr": 0.1, "schedule": "step", "milestones": [60, 75]},
        },
        autoattack={"cpu": 300, "gpu": None},
        precision={"cpu": "bf16", "gpu": "fp32"},
        pairs=tuple((arm, "at_bsl") for arm in ("at", *REAT_FORMS)),
    ),
    "deat": Study(
        question="Does DEAT make PGD-AT more robust than plain SGD and SGD with momentum 0.9 at the same nominal rate, "
        "and does that survive matching the effective rate?",
        arms={f"{name}_{lr:g}": Arm(OPTIMIZERS[name] | {"lr": lr}) for name, lr in NOMINAL + MATCHED},
        common={
            "cpu": SMALL_NET
            | {"method": "pgd", "steps": 3, "alpha": 4 / 255, "val_fraction": 0.01, "val_steps": 5}
            | {"train_size": 10000, "epochs": 8, "schedule": "step", "milestones": [6, 7]},
            "gpu": GPU_NET
            | {"method": "pgd", "steps": 10, "alpha": 2 / 255, "val_fraction": 0.02}
            | {"epochs": 110, "schedule": "step", "milestones": [100, 105]},
        },
        autoattack={"cpu": 200, "gpu": None},
        precision={"cpu": "bf16", "gpu": "fp32"},
        pairs=tuple(
            (f"deat_{lr:g}", f"{other}_{rate:g}")
            for other in ("sgd", "momentum")
            for lr, rate in [
                *((lr, lr) for lr in RATES),
                *((effective * EFFECTIVE["deat"], effective * EFFECTIVE[other]) for effective in EFFECTIVE_RATES),
            ]
        ),
    ),
}


def run_arm(study: str, arm: str, seed: int, args: argparse.Namespace) -> Path:
    """Train and attack one arm with one seed; return its result file."""
    out = args.results / f"{study}-{args.scale}" / f"{arm}-seed{seed}.json"
    if out.exists():
        return out
    plan, started = STUDIES[study], time.time()
    chosen = (plan.arms | plan.ablations)[arm]
    options = {"eps": EPS} | plan.common[args.scale] | chosen.options
    run = train(args.runs / f"{study}-{args.scale}" / f"{arm}-seed{seed}", data=args.data, seed=seed, **options)
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
    first = seed == plan.seeds[0] or not chosen.only_first_seed_attacked
    result |= measure(run, plan, args, options["eps"], attacked=first and plan.autoattack[args.scale] != 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result |= {"machine": machine(device), "wall_seconds": time.time() - started}
    write_json(out, result)
    return out


def measure(run: RunDirectory, plan: Study, args: argparse.Namespace, eps: float, *, attacked: bool) -> dict:
    """Clean and PGD-20 accuracy on all test images for the best and the last epoch; AutoAttack on the best."""
    trained = run.config()["data"]
    class_counts = trained["class_counts"] if trained["imbalance_ratio"] else None
    test = load_dataset(args.data, val_fraction=0.0).test
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict = {}
    for kind in ("last", "best"):
        if not run.weights(kind).is_file():
            continue
        if "last" in result and run.weights(kind).read_bytes() == run.weights("last").read_bytes():
            result[kind] = result["last"]
            continue
        model = load_model(run.weights(kind)).to(device)
        result[kind] = {"clean": accuracies(model, test, class_counts)}
        if plan.pgd20:
            result[kind]["pgd20"] = accuracies(model, test, class_counts, PGD(model, eps, eps / 4, 20))
    if attacked:
        result["autoattack"] = evaluate(
            load_model(run.published_weights()).to(device),
            test if plan.autoattack[args.scale] is None else test.subset(plan.autoattack[args.scale]),
            eps=eps,
            state_dir=run.path / "autoattack_state",
            class_counts=class_counts,
            precision=plan.precision[args.scale],
        ).to_dict()
    return result


def accuracies(
    model: nn.Module, test: LabelledSplit, class_counts: list[int] | None, attack: PGD | None = None
) -> dict:
    """Accuracy on the test split, under an attack if one is given; by class and group after long-tailed training.

    Attacks search in bf16 on the folded model; whether an image is classified rightly, the model says in fp32.
    """
    if class_counts is None:
        return share(count_correct(model, test, attack=attack, search="bf16"))
    counts = count_correct_by_class(model, test, len(class_counts), attack=attack, search="bf16").cpu()
    by_class = by_frequency({"test": counts}, class_counts)
    return share(counts.sum(0)) | {name: values["test"] for name, values in by_class.items()}


def summarise(study: str, args: argparse.Namespace) -> Path:
    """Write every arm's mean accuracies and the paired differences of the study's pairs, over the seeds there are."""
    folder = args.results / f"{study}-{args.scale}"
    found: dict[str, dict[str, dict[int, float]]] = {}  # arm -> what was measured -> seed -> accuracy
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))]
    for result in results:
        for name, value in measured(result).items():
            found.setdefault(result["arm"], {}).setdefault(name, {})[result["seed"]] = value
    summary = {
        "question": STUDIES[study].question,
        "means": {
            arm: {name: statistics.fmean(values.values()) for name, values in of_arm.items()}
            for arm, of_arm in found.items()
        },
        "differences": {
            f"{arm} - {reference}": {
                name: paired(values, found[reference].get(name, {})) for name, values in found[arm].items()
            }
            for arm, reference in STUDIES[study].pairs
            if arm in found and reference in found
        },
    }
    return write_json(folder / "summary.json", summary | sweep(results, folder))


def sweep(results: list[dict], folder: Path) -> dict:
    """Where the arms are a sweep over lr / batch size: draw it, and return the rank correlations with PGD-20."""
    points = [
        sweep_point(
            f"{result['arm']}-seed{result['seed']}",
            {"batch_size": 128, "momentum": 0.9} | result["options"],
            result["last"]["pgd20"]["accuracy"],
            result["epochs"][-1]["train_accuracy"],
        )
        for result in results
        if "lr" in result["options"] and "optimizer" in result["options"]
    ]
    if not is_sweep(points):
        return {}
    figures.save_png(sweep_plots.sweep(points, "PGD-20 accuracy, last epoch"), folder / "lr_batch.png")
    return {"rank_correlations": [asdict(row) for row in rank_correlations(points)]}


def measured(result: dict) -> dict[str, float]:
    """Return the accuracies on the test images of a result by name, such as ``best/pgd20/tail``."""
    values = {}
    for kind in ("best", "last"):
        for name, of_attack in result.get(kind, {}).items():
            values[f"{kind}/{name}"] = of_attack["accuracy"]
            groups = of_attack.get("groups", {})
            values |= {f"{kind}/{name}/{group}": value for group, value in groups.items() if value is not None}
    return values


def paired(values: dict[int, float], reference: dict[int, float]) -> dict:
    """Return the differences on the seeds that both have, their mean, and Student's 95 % interval of it."""
    seeds = sorted(values.keys() & reference.keys())
    differences = [values[seed] - reference[seed] for seed in seeds]
    summary = {"seeds": seeds, "differences": differences}
    if not seeds:
        return summary
    mean = statistics.fmean(differences)
    if len(seeds) == 1:
        return summary | {"mean": mean, "interval": None, "differs": None}
    half = t.ppf(0.975, len(seeds) - 1) * statistics.stdev(differences) / len(seeds) ** 0.5
    low, high = mean - float(half), mean + float(half)
    return summary | {"mean": mean, "interval": [low, high], "differs": not low <= 0 <= high}


def share(counts: torch.Tensor) -> dict:
    """Correct, of how many, and their ratio."""
    right, total = counts.tolist()
    return {"correct": right, "images": total, "accuracy": right / total}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES, help="; ".join(f"{k}: {s.question}" for k, s in STUDIES.items()))
    parser.add_argument("--data", default="npz:cifar10.npz", help="CIFAR-10, as at-extensions train takes it")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the study's own")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    study = STUDIES[args.study]
    for arm in args.arms or ():
        check_name("arm", arm, study.arms | study.ablations)
    args.seeds = args.seeds or list(study.seeds)
    for seed in args.seeds:  # seed by seed, so that an unfinished study is already paired
        for arm in args.arms or study.arms:
            print(run_arm(args.study, arm, seed, args), flush=True)
            if study.pairs:
                summarise(args.study, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
