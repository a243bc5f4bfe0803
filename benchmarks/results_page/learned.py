"""The sections of RESULTS.md on trained networks: accuracy, REAT, DEAT, criticality."""

from __future__ import annotations

import re
from pathlib import Path

from at_extensions.experiments import PairedDifference, StudySummary, summarise
from at_extensions.experiments.summary import read_results
from reproduce import STUDIES
from results_page.words import load, network, origin, percent, points, table, verdict


def study_origin(rows: list[dict]) -> str:
    """Return command, machine, scale, seeds and setting of a study."""
    command = re.sub(r" --arms \S+ --seeds \d+", "", rows[0]["command"])
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    return origin(command, rows, f"Scale: {rows[0]['scale']}. Seeds: {seeds}.") + f"\n{rows[0]['question']}\n"


def autoattack(row: dict | None) -> str:
    """Return robust accuracy with its interval and the number of images."""
    if row is None or "autoattack" not in row:
        return ""
    found = row["autoattack"]
    low, high = (f"{100 * end:.1f}" for end in found["interval"])
    return f"{percent(found['robust_accuracy'])} ({low} to {high}; {found['n_examples']} images)"


def baseline(results: Path) -> str:
    rows = read_results(STUDIES["baseline"], results / "baseline-cpu")
    lines = [
        (network(row["options"]), row["options"]["epochs"], percent(row["best"]["clean"]["accuracy"]),
         percent(row["best"]["pgd20"]["accuracy"]), autoattack(row))
        for row in rows
    ]  # fmt: skip
    images = rows[0]["best"]["clean"]["images"]
    return (
        study_origin(rows)
        + f"\nN-FGSM on CIFAR-10, Linf 8/255, best epoch by validation; clean and PGD-20 on {images:,} test images.\n\n"
        + table(["network", "epochs", "clean", "PGD-20", "AutoAttack"], lines)
    )


def differences(summary: StudySummary, reference: str, name: str) -> dict[str, PairedDifference]:
    """Return every arm's difference to a reference in one number."""
    found = {tuple(pair.split(" - ")): numbers for pair, numbers in summary.differences.items()}
    return {arm: numbers[name] for (arm, other), numbers in found.items() if other == reference}


def first_seed(rows: list[dict]) -> dict[str, dict]:
    """Return each arm's result of its first seed."""
    return {row["arm"]: row for row in sorted(rows, key=lambda row: -row["seed"])}


REAT_NAMES = {
    "at": "PGD-AT",
    "at_bsl": "AT-BSL",
    "reat_released": "REAT, released",
    "reat_pairwise_logit": "REAT, pairwise and logit-weighted",
    "reat_pairwise": "REAT, pairwise",
    "reat_pairwise_logit_0.1": "REAT, pairwise and logit-weighted, `tail_weight=0.1`",
    "reat_logit_no_tail": "REAT, logit-weighted, `tail_weight=0`",
    "at_bsl_class_eps": "AT-BSL, class-wise radii",
}


def reat(results: Path) -> str:
    folder, study = results / "reat-cpu", STUDIES["reat"]
    rows, summary = read_results(study, folder), summarise(study, folder)
    first, means, options = first_seed(rows), summary.means, rows[0]["options"]
    last, best, tail = (
        differences(summary, "at_bsl", name) for name in ("last/pgd20", "best/pgd20", "last/pgd20/tail")
    )
    arms = [arm for arm in REAT_NAMES if arm in means]
    parts = ("last/clean", "last/pgd20", "last/pgd20/head", "last/pgd20/medium", "last/pgd20/tail")
    accuracies = [
        (REAT_NAMES[arm], *(percent(means[arm][part]) for part in parts), autoattack(first[arm])) for arm in arms
    ]
    compared = [
        (REAT_NAMES[arm], points(last[arm]), verdict(last[arm].differs, last[arm].mean), points(best[arm]),
         verdict(best[arm].differs, best[arm].mean), points(tail[arm]))
        for arm in arms
        if arm in last
    ]  # fmt: skip
    return (
        study_origin(rows)
        + f"\nCIFAR-10-LT, imbalance ratio {options['imbalance_ratio']}: {network(options)}, {options['epochs']} "
        f"epochs with PGD-{options['steps']}. Last epoch, {rows[0]['last']['clean']['images']:,} balanced test images, "
        "means over the seeds; AutoAttack at the best epoch by validation, first seed.\n\n"
        + table(["", "clean", "PGD-20", "head", "medium", "tail", "AutoAttack"], accuracies)
        + "\nDifference to AT-BSL under PGD-20 in points, and the claim that the arm is more robust than AT-BSL:\n\n"
        + table(["", "last epoch", "claim", "best epoch", "claim", "tail classes, last epoch"], compared)
        + "\nThe released form has two defects that keep it near AT-BSL; the pairwise tail term and the logit "
        "weighting are what the paper intends. Networks this small decide nothing about large ones: `--scale gpu` is "
        "the same study with the paper's recipe.\n"
    )


DEAT_NAMES = {"sgd": "plain SGD", "momentum": "SGD, momentum 0.9", "deat": "DEAT"}


def deat(results: Path) -> str:
    folder, study = results / "deat-cpu", STUDIES["deat"]
    rows, summary = read_results(study, folder), summarise(study, folder)
    first, means, options = first_seed(rows), summary.means, rows[0]["options"]
    effective = {
        point.run.rpartition("-seed")[0]: point.effective_ratio * options.get("batch_size", 128)
        for point in summary.points
    }

    def named(arm: str) -> tuple[str, str, str]:
        return DEAT_NAMES[arm.partition("_")[0]], f"{first[arm]['options']['lr']:.3g}", f"{effective[arm]:.2g}"

    accuracies = [
        (*named(arm), percent(means[arm]["last/clean"]), percent(means[arm]["last/pgd20"]), autoattack(first[arm]))
        for arm in study.arms
        if arm in means
    ]
    compared = []
    for pair, found in summary.differences.items():
        arm, other = pair.split(" - ")
        (_, lr, own), (name, other_lr, _) = named(arm), named(other)
        equal = f"nominal {lr}" if lr == other_lr else f"effective {own}"
        last, best = found["last/pgd20"], found["best/pgd20"]
        compared.append((name, equal, points(last), verdict(last.differs, last.mean), points(best)))
    correlations = [(row.series, row.runs, f"{row.nominal:.2f}", f"{row.effective:.2f}")
                    for row in summary.rank_correlations]  # fmt: skip
    return (
        study_origin(rows)
        + f"\nPGD-AT (PGD-{options['steps']}) of {network(options)} on {options['train_size']:,} CIFAR-10 images for "
        f"{options['epochs']} epochs, the rate divided by ten after {' and '.join(map(str, options['milestones']))}. "
        f"Last epoch, {rows[0]['last']['clean']['images']:,} test images, means over the seeds; AutoAttack at the best "
        "epoch, first seed.\n\n"
        + table(["optimiser", "nominal lr", "effective lr", "clean", "PGD-20", "AutoAttack"], accuracies)
        + "\nDEAT's difference under PGD-20 in points, and the claim that it is more robust at the equal rate:\n\n"
        + table(["against", "equal lr", "last epoch", "claim", "best epoch"], compared)
        + "\nSpearman's rank correlation of PGD-20 accuracy with lr / batch size (`results/deat-cpu/lr_batch.png`):\n\n"
        + table(["runs of", "runs", "nominal lr", "effective lr"], correlations)
        + "\nAt the same nominal rate DEAT moves less. So short a training says nothing about 110 epochs on all of "
        "CIFAR-10, where noise may pay: `--scale gpu` is that study.\n"
    )


CLAIM = {"confirmed": "holds", "refuted": "does not hold", "undecided": "not decided at this scale"}
SUBJECTS = {
    "shipped": "clean, the ResNet-18 in pyautoattack's wheel",
    "standard": "clean, width 16",
    "at2": "N-FGSM at 2/255, width 16",
    "at8": "N-FGSM at 8/255, width 16",
}


def criticality_study(results: Path) -> str:
    found = load(results / "criticality_study" / "study.json")
    thirds, models, base = ("early", "middle", "late"), found["models"], found["against"]
    rows = [
        (SUBJECTS.get(name, name), percent(model["accuracy"]), percent(model["average"]),
         *(percent(model["thirds"][part]) for part in thirds))
        for name, model in models.items()
    ]  # fmt: skip
    adversarial = {name: raised for name, raised in found["raised"].items() if models[name]["eps"] > 0}
    compared = []
    for name, raised in adversarial.items():
        for part in (*thirds, "all"):
            row = raised[part]
            ends = f" ({100 * row['low']:+.0f} to {100 * row['high']:+.0f})" if "low" in row else ""
            difference = f"{100 * row['difference']:+.0f}{ends}"
            compared.append((SUBJECTS.get(name, name), part, difference, CLAIM[row["raised"]]))
        compared.append((SUBJECTS.get(name, name), "spread more evenly", "",
                         "holds" if raised["spread_more_evenly"] else "does not hold"))  # fmt: skip
    command = (
        f"python benchmarks/criticality_study.py --data npz:{found['data']}.npz --n-images {found['n_images']} "
        "--models NAME=SOURCE@EPS ..."
    )
    scale = f"Scale: {found['n_images']} test images. Seed: {found['seed']}; one training run for each network."
    return (
        origin(command, [found], scale)
        + f"\n{found['question']} Pictures lie in `results/criticality_study/`.\n\n"
        + table(["trained", "accuracy", "average criticality", *(f"{part} third" for part in thirds)], rows)
        + f"\nDifference to *{SUBJECTS.get(base, base)}* in points, and the claim (Gavrikov et al. 2024) that "
        "adversarial training raises criticality and spreads it:\n\n"
        + table(["trained", "layers", "difference", "claim"], compared)
        + f"\nRank correlation of eps and the average: {found['with_eps']['spearman']:.2f}. Small robust networks "
        "predict with little confidence, and 1 - cosine of probabilities then moves less; large ImageNet networks "
        "may differ.\n"
    )
