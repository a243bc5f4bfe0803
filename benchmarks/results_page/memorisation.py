"""The section of RESULTS.md on random labels: memorisation, and the attack's share of the gradient's instability."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from at_extensions.experiments import PairedDifference, StudySummary, summarise
from at_extensions.experiments.summary import read_results
from reproduce import STUDIES
from results_page.learned import study_origin
from results_page.words import network, percent, points, table, verdict

NAMES = {"pgd": "PGD-AT", "trades": "TRADES", "standard": "clean training"}
COLUMNS = {
    "training labels": "last/train/clean",
    "training labels, PGD-10": "last/train/pgd10",
    "test": "last/test/clean",
    "test, PGD-10": "last/test/pgd10",
}


def random_labels(results: Path) -> str:
    """Return the means of each arm, and the two claims of Dong et al. with their verdicts."""
    study, folder = STUDIES["random_labels"], results / "random_labels-cpu"
    rows, summary = read_results(study, folder), summarise(study, folder)
    means, options = summary.means, rows[0]["options"]
    arms = {arm: (NAMES[arm.partition("-r")[0]], percent(float(arm.partition("-r")[2]), 0)) for arm in study.arms}
    accuracies = [
        (*arms[arm], *(percent(means[arm][name]) for name in COLUMNS.values())) for arm in arms if arm in means
    ]
    unstable = [
        (*arms[arm], *(_number(means[arm].get(f"instability_{way}")) for way in ("recomputed", "frozen", "attack")))
        for arm in arms
        if arm in means
    ]
    flipped = [
        (*arms[arm], percent(means[arm]["flipped_share"]), percent(means[arm]["last/flipped/clean"]),
         percent(means[arm]["last/flipped/pgd10"]), percent(means[arm]["last/corrected/clean"]))
        for arm in arms
        if "last/flipped/clean" in means.get(arm, {})
    ]  # fmt: skip
    return (
        study_origin(rows)
        + f"\n{network(options)} on {options['train_size']:,} CIFAR-10 images for {options['epochs']} epochs, Linf "
        f"8/255, PGD-{_attack_steps(rows)} in training, no augmentation, no weight decay; labels redrawn evenly over "
        "all classes. Last epoch, means over the seeds; test accuracy on "
        f"{rows[0]['last']['test']['clean']['images']:,} images. Figures: "
        "`results/random_labels-cpu/memorisation.png` and `instability.png`.\n\n"
        + table(["", "labels redrawn", *COLUMNS], accuracies)
        + "\nWrong labels that were learned, and those that the network corrects:\n\n"
        + table(["", "labels redrawn", "wrong labels", "learned", "learned, PGD-10", "corrected"], flipped)
        + "\nRelative change of the training gradient one step of the peak rate along the update, with the attack "
        "recomputed and frozen (a reconstruction), and the attack's share:\n\n"
        + table(["", "labels redrawn", "recomputed", "frozen", "attack's share"], unstable)
        + "\nThe claims of Dong et al. (2022), at 100 % of labels redrawn:\n\n"
        + table(["claim", "difference", "verdict"], _claims(summary))
    )


def _attack_steps(rows: list[dict]) -> int:
    """Return the steps of the training attack, from an arm that has one."""
    return next(row["options"]["steps"] for row in rows if row["options"]["steps"] is not None)


def _claims(summary: StudySummary) -> list[tuple[str, str, str]]:
    """Return each claim, its paired difference over the seeds, and the verdict."""
    found = summary.differences.get("trades-r1 - pgd-r1", {})
    lines = []
    if "last/train/pgd10" in found:
        difference = found["last/train/pgd10"]
        lines.append(("PGD-AT memorises random labels less than TRADES (training accuracy under PGD-10, TRADES minus "
                      "PGD-AT, points)", points(difference), verdict(difference.differs, difference.mean)))  # fmt: skip
    if "instability_attack" in found:
        difference = _negated(found["instability_attack"])
        lines.append(("The attack makes PGD-AT's gradient less stable than TRADES's (attack's share, PGD-AT minus "
                      "TRADES)", _interval(difference), verdict(difference.differs, difference.mean)))  # fmt: skip
    return lines


def _negated(difference: PairedDifference) -> PairedDifference:
    """Return the difference the other way round."""
    ends = None if difference.interval is None else (-difference.interval[1], -difference.interval[0])
    values = tuple(-value for value in difference.differences)
    return replace(difference, differences=values, mean=-difference.mean, interval=ends)


def _interval(difference: PairedDifference) -> str:
    text = f"{difference.mean:+.3f}"
    if difference.interval is None:
        return text
    return text + f" ({difference.interval[0]:+.3f} to {difference.interval[1]:+.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
