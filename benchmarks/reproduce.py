"""Accuracy studies on CIFAR-10: their definitions; ``at_extensions.experiments`` runs them.

    python benchmarks/reproduce.py baseline --data npz:cifar10.npz --scale cpu
    python benchmarks/reproduce.py reat --data npz:cifar10.npz --scale gpu --seeds 0 1 2

Finished cells are skipped, interrupted ones go on where they were. Runs (checkpoints, metrics) go to --runs; results go
to --results/<study>-<scale>/<arm>-seed<seed>.json, with summary.json beside them. Several processes may share a study:
start the same command again, and with --threads give each its share of the cores.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from at_extensions.experiments import (
    Arm,
    Cell,
    InjectedAccuracy,
    RobustAccuracy,
    Study,
    induced_distribution,
    random_labels_study,
    run_study,
)
from at_extensions.experiments.feature_injection import table, write_collapses
from at_extensions.experiments.random_labels import write_figures
from at_extensions.memory import keep_freed_memory
from at_extensions.runs import RunDirectory

EPS = 8 / 255


def measured(cpu: RobustAccuracy):
    """Return a measurement that takes a part of AutoAttack's test images on a CPU and all of them on a GPU."""
    gpu = RobustAccuracy(autoattack=None, pgd_precision="bf16")

    def measure(run: RunDirectory, cell: Cell) -> dict:
        return (cpu if cell.scale == "cpu" else gpu)(run, cell)

    return measure


def injected(run: RunDirectory, cell: Cell) -> dict:
    """Measure a run with injected features, on a part of the test images on a CPU."""
    measure = InjectedAccuracy(20, 500) if cell.scale == "cpu" else InjectedAccuracy(50)
    return measure(run, cell)


def both_checkpoints(run: RunDirectory, cell: Cell) -> dict:
    """AutoAttack on the best and the last checkpoint, on a part of the test images on a CPU."""
    images = 300 if cell.scale == "cpu" else None
    return RobustAccuracy(pgd_steps=0, autoattack=images, every_seed=True, checkpoints=("best", "last"))(run, cell)


def last_checkpoint(run: RunDirectory, cell: Cell) -> dict:
    """AutoAttack on the last checkpoint, on a part of the test images on a CPU."""
    images = 300 if cell.scale == "cpu" else None
    return RobustAccuracy(pgd_steps=0, autoattack=images, every_seed=True, checkpoints=("last",))(run, cell)


INDUCED = {  # the new networks of the induced distribution experiment; on a GPU those of the paper
    "cpu": {"images": 1000, "test_images": 1000, "net_epochs": 15, "batch_size": 32, "starts": 5, "probe": 64},
    "gpu": {"net_epochs": 99, "schedule": "step", "milestones": [60, 80], "precision": "bf16", "zero_start": True},
}


def induced(run: RunDirectory, cell: Cell) -> dict:
    """The induced distribution experiment on every kept epoch; by themselves the errors at the last one."""
    options = INDUCED[cell.scale] | {"seeds": [cell.seed], "progress": False}
    found = induced_distribution(run, run.path / "induced_distribution", **options).to_dict()
    last = found["rows"][-1]["nets"]
    errors = {"ide_a": last["a"]["error"], "ide_b": last["b"]["error"], "clean": last["clean"]["error"]}
    return errors | {"induced": found}


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

# Injected features: amplitudes in steps of 1/255, at a radius that plain FGSM training survives


def injection_arm(method: str, beta: int, **options) -> Arm:
    return Arm({"method": method, "inject_beta": beta / 255, **options})


# robust overfitting: each remedy under a schedule that drops the rate, and under one that ends at 0
REMEDIES = {
    "pgd": {"method": "pgd"},
    "te": {"method": "te"},
    "ema": {"method": "pgd", "ema": 0.99},
    "awp": {"method": "awp"},
}
SCHEDULES = {"piecewise": {"schedule": "step"}, "cyclic": {"schedule": "onecycle"}}

STUDIES = {
    "baseline": Study(
        name="baseline",
        question="How robust is the plain N-FGSM baseline of this package on CIFAR-10?",
        arms={
            "n_fgsm": Arm({"method": "n_fgsm"}),
            "n_fgsm_wrn": Arm({"method": "n_fgsm", "model": "wide_resnet_10_2", "model_options": None, "epochs": 10}),
        },
        common={"eps": EPS},
        scales={
            "cpu": CPU_NET | {"epochs": 24, "lr": 0.2, "warmup": 0.3, "val_fraction": 0.02},
            "gpu": GPU_NET | {"epochs": 30, "lr": 0.2, "warmup": 0.3, "val_fraction": 0.02},
        },
        seeds=(0,),
        measure=measured(RobustAccuracy(autoattack=500, pgd_precision="bf16")),
    ),
    "strength": Study(
        name="strength",
        question="Networks of one architecture, trained clean and at growing eps, for measurements of the model.",
        arms={
            "standard": Arm({"method": "standard"}),
            "eps2": Arm({"method": "n_fgsm", "eps": 2 / 255}),
            "eps4": Arm({"method": "n_fgsm", "eps": 4 / 255}),
            "eps8": Arm({"method": "n_fgsm", "eps": 8 / 255}),
        },
        common={"eps": EPS},
        scales={
            "cpu": CPU_NET | {"epochs": 12, "lr": 0.2, "warmup": 0.3, "val_fraction": 0.02},
            "gpu": GPU_NET | {"epochs": 30, "lr": 0.2, "warmup": 0.3, "val_fraction": 0.02},
        },
        seeds=(0,),
        measure=RobustAccuracy(autoattack=0, pgd_precision="bf16"),
    ),
    "reat": Study(
        name="reat",
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
        common={"eps": EPS},
        scales={
            "cpu": SMALL_NET
            | LONG_TAIL
            | {"steps": 3, "alpha": 4 / 255, "epochs": 12, "lr": 0.2, "warmup": 0.3, "val_steps": 5},
            "gpu": GPU_NET
            | LONG_TAIL
            | {"steps": 10, "alpha": 2 / 255, "epochs": 80, "lr": 0.1, "schedule": "step", "milestones": [60, 75]},
        },
        measure=measured(RobustAccuracy(autoattack=300, precision="bf16", pgd_precision="bf16")),
        pairs=tuple((arm, "at_bsl") for arm in ("at", *REAT_FORMS)),
    ),
    "deat": Study(
        name="deat",
        question="Does DEAT make PGD-AT more robust than plain SGD and SGD with momentum 0.9 at the same nominal rate, "
        "and does that survive matching the effective rate?",
        arms={f"{name}_{lr:g}": Arm(OPTIMIZERS[name] | {"lr": lr}) for name, lr in NOMINAL + MATCHED},
        common={"eps": EPS},
        scales={
            "cpu": SMALL_NET
            | {"method": "pgd", "steps": 3, "alpha": 4 / 255, "val_fraction": 0.01, "val_steps": 5}
            | {"train_size": 10000, "epochs": 8, "schedule": "step", "milestones": [6, 7]},
            "gpu": GPU_NET
            | {"method": "pgd", "steps": 10, "alpha": 2 / 255, "val_fraction": 0.02}
            | {"epochs": 110, "schedule": "step", "milestones": [100, 105]},
        },
        measure=measured(RobustAccuracy(autoattack=200, precision="bf16", pgd_precision="bf16")),
        pairs=tuple(
            (f"deat_{lr:g}", f"{other}_{rate:g}")
            for other in ("sgd", "momentum")
            for lr, rate in [
                *((lr, lr) for lr in RATES),
                *((effective * EFFECTIVE["deat"], effective * EFFECTIVE[other]) for effective in EFFECTIVE_RATES),
            ]
        ),
    ),
    "overfitting": Study(
        name="overfitting",
        question="How far does AutoAttack accuracy fall from the best to the last epoch of PGD-AT, and do temporal "
        "ensembling, averaged weights or adversarial weight perturbation stop the fall, under either schedule?",
        arms={
            f"{remedy}_{schedule}": Arm(REMEDIES[remedy] | SCHEDULES[schedule])
            for schedule in SCHEDULES
            for remedy in REMEDIES
        },
        common={"eps": EPS},
        scales={
            "cpu": SMALL_NET
            | {"precision": "fp32", "train_size": 1000, "val_fraction": 0.005, "val_steps": 5}
            | {"steps": 3, "alpha": 4 / 255, "epochs": 40, "batch_size": 64, "augment": "none"},
            "gpu": GPU_NET
            | {"model": "cifar_resnet18", "val_fraction": 0.02}
            | {"steps": 10, "alpha": 2 / 255, "epochs": 200},
        },
        measure=both_checkpoints,
        pairs=tuple(
            (f"{remedy}_{schedule}", f"pgd_{schedule}")
            for schedule in SCHEDULES
            for remedy in REMEDIES
            if remedy != "pgd"
        )
        + tuple((f"te_{schedule}", f"ema_{schedule}") for schedule in SCHEDULES),
    ),
    "feature_injection": Study(
        name="feature_injection",
        question="Do features of the classes in CIFAR-10 images make FGSM training overfit catastrophically where "
        "it does not without them, and do PGD-AT, N-FGSM and features drawn at random not?",
        arms={
            **{f"fgsm_beta{beta}": injection_arm("fgsm", beta) for beta in (0, 2, 4, 8, 16)},
            "fgsm_beta8_permuted": injection_arm("fgsm", 8, inject_permuted=True),
            "pgd_beta8": injection_arm("pgd", 8, steps=3, alpha=2 / 255),
            "n_fgsm_beta8": injection_arm("n_fgsm", 8),
            "grad_align_beta8": injection_arm("grad_align", 8),
        },
        ablations={"pgd10_beta8": injection_arm("pgd", 8, steps=10, alpha=1 / 255)},
        common={"eps": 4 / 255, "augment": "none", "lr": 0.2, "warmup": 0.5},
        scales={
            "cpu": SMALL_NET
            | {"precision": "fp32", "train_size": 2000, "batch_size": 64, "epochs": 15}
            | {"val_fraction": 0.01, "val_steps": 5},
            "gpu": GPU_NET | {"batch_size": 128, "epochs": 30, "val_fraction": 0.02},
        },
        measure=injected,
    ),
    "collapse_guard": Study(
        name="collapse_guard",
        question="Does the guard keep RS-FGSM at 16/255 robust, where it collapses without?",
        arms={
            "unguarded": Arm({}),
            "guarded": Arm({"guard": "rollback", "guard_remedy": "n_fgsm"}),
        },
        common={"eps": 16 / 255, "method": "rs_fgsm", "lr": 0.2, "warmup": 0.3},
        scales={
            "cpu": CPU_NET
            | {"precision": "fp32", "train_size": 4000, "batch_size": 64, "epochs": 16, "augment": "none"}
            | {"val_fraction": 0.01, "val_steps": 5},
            "gpu": GPU_NET | {"epochs": 30, "val_fraction": 0.02},
        },
        measure=last_checkpoint,
        pairs=(("guarded", "unguarded"),),
    ),
    "random_labels": random_labels_study(
        rates=(0.0, 1.0),
        common={"eps": EPS, "lr": 0.1, "schedule": "step", "weight_decay": 0.0, "augment": "none", "val_fraction": 0.0},
        scales={
            "cpu": SMALL_NET
            | {"precision": "fp32", "train_size": 500, "batch_size": 32, "epochs": 30}
            | {"steps": 3, "alpha": 4 / 255},
            "gpu": {"model": "wide_resnet_28_10", "precision": "bf16", "epochs": 300, "milestones": [100, 200]}
            | {"batch_size": 128, "steps": 10, "alpha": 2 / 255},
        },
    ),
    "induced_distribution": Study(
        name="induced_distribution",
        question="Are adversarial examples of an overfitted checkpoint harder to learn from, or only those of images "
        "that it was trained on?",
        arms={schedule: Arm(options) for schedule, options in SCHEDULES.items()},
        common={"eps": EPS, "method": "pgd"},
        scales={
            "cpu": SMALL_NET
            | {"precision": "fp32", "train_size": 1000, "val_fraction": 0.005, "val_steps": 5, "augment": "none"}
            | {"steps": 3, "alpha": 4 / 255, "epochs": 40, "batch_size": 64, "keep_every": 20},
            "gpu": GPU_NET
            | {"train_size": 24500, "val_fraction": 0.02}
            | {"steps": 10, "alpha": 2 / 255, "epochs": 200, "keep_every": 20},
        },
        measure=induced,
        pairs=(tuple(SCHEDULES),),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES, help="; ".join(f"{k}: {s.question}" for k, s in STUDIES.items()))
    parser.add_argument("--data", default="npz:cifar10.npz", help="CIFAR-10, as at-extensions train takes it")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--arms", nargs="+", help="only these arms; ablations run when they are named")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the study's own")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    args = parser.parse_args()
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("at_extensions.experiments").setLevel(logging.INFO)
    folder = f"{args.study}-{args.scale}"
    kind, _, place = args.data.rpartition(":")
    shown = f"{kind}:{Path(place).name}".lstrip(":")  # folders of one machine do not belong in a result
    progress = run_study(
        STUDIES[args.study],
        args.results / folder,
        runs=args.runs / folder,
        scale=args.scale,
        arms=args.arms,
        seeds=args.seeds,
        local={"data": args.data},
        threads=args.threads,
        command=f"python benchmarks/reproduce.py {args.study} --data {shown} --scale {args.scale} "
        "--arms {arm} --seeds {seed}",
    )
    if args.study == "random_labels":
        write_figures(STUDIES[args.study], args.results / folder)
    print(progress)
    if args.study == "feature_injection" and progress.summary is not None:
        print(table(write_collapses(STUDIES[args.study], args.results / folder)))
    return 1 if progress.failed else 0


if __name__ == "__main__":
    sys.exit(main())
