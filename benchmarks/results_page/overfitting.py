"""The section of RESULTS.md on robust overfitting and its remedies."""

from __future__ import annotations

from pathlib import Path

from at_extensions.experiments import paired_interval, summarise
from at_extensions.experiments.summary import read_results
from reproduce import REMEDIES, SCHEDULES, STUDIES
from results_page.learned import study_origin
from results_page.words import network, percent, points, table, verdict

NAMES = {"pgd": "PGD-AT", "te": "temporal ensembling", "ema": "averaged weights", "awp": "AWP"}


def overfitting(results: Path) -> str:
    folder, study = results / "overfitting-cpu", STUDIES["overfitting"]
    rows, summary = read_results(study, folder), summarise(study, folder)
    means, values, options = summary.means, summary.values, rows[0]["options"]
    arms = {f"{remedy}_{schedule}": (NAMES[remedy], schedule) for schedule in SCHEDULES for remedy in REMEDIES}
    arms = {arm: name for arm, name in arms.items() if arm in means}

    def seeds(arm: str, kind: str) -> dict[int, float]:
        return values[arm][f"{kind}/autoattack"]

    accuracies = []
    for arm, (name, schedule) in arms.items():
        fall = paired_interval(seeds(arm, "best"), seeds(arm, "last"))
        accuracies.append((name, schedule, *(percent(means[arm][f"{kind}/autoattack"]) for kind in ("best", "last")),
                           points(fall), verdict(fall.differs, fall.mean)))  # fmt: skip
    compared = []
    for remedy, schedule in ((r, s) for s in SCHEDULES for r in REMEDIES if r != "pgd"):
        arm = f"{remedy}_{schedule}"
        for text, other, kind in (
            ("PGD-AT, last epoch", f"pgd_{schedule}", "last"),
            ("PGD-AT stopped at its best epoch", f"pgd_{schedule}", "best"),
            ("averaged weights, last epoch", f"ema_{schedule}", "last"),
        ):
            if arm in arms and other in arms and other != arm:
                found = paired_interval(seeds(arm, "last"), seeds(other, kind))
                compared.append((NAMES[remedy], schedule, text, points(found), verdict(found.differs, found.mean)))
    images = rows[0]["last"]["autoattack"]["images"]
    return (
        study_origin(rows)
        + f"\nPGD-AT (PGD-{options['steps']}) of {network(options)} on {options['train_size']:,} CIFAR-10 images, "
        f"{options['epochs']} epochs, augmentation {options.get('augment', 'crop_flip')}; standard AutoAttack on "
        f"{images} test images, means over the seeds. The best epoch is chosen on held-out validation images.\n\n"
        + table(
            ["", "schedule", "best epoch", "last epoch", "best minus last", "claim: robust overfitting"], accuracies
        )
        + "\nThe last epoch with a remedy, in points, and the claim that it is more robust:\n\n"
        + table(["remedy", "schedule", "against", "difference", "claim"], compared)
        + "\nA remedy is worth its cost where it beats early stopping and averaged weights. Networks and training sets "
        "this small decide nothing about large ones: `--scale gpu` is the study with the papers' recipe.\n"
    )
