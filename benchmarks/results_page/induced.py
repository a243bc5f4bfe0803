"""The section of RESULTS.md on the induced distribution experiment and its held-out control."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from at_extensions.experiments import paired_interval
from at_extensions.experiments.summary import read_results
from reproduce import SCHEDULES, STUDIES
from results_page.learned import study_origin
from results_page.words import network, percent, points, table, verdict

Errors = dict[int, dict[int, dict[str, float]]]  # seed -> epoch -> network -> error


def errors_of(rows: list[dict]) -> Errors:
    """Return the errors of an arm's networks."""
    return {
        row["seed"]: {
            at["epoch"]: {name: net["error"] for name, net in at["nets"].items()} for at in row["induced"]["rows"]
        }
        for row in rows
    }


def induced(results: Path) -> str:
    rows = read_results(STUDIES["induced_distribution"], results / "induced_distribution-cpu")
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in SCHEDULES}
    arms = {arm: own for arm, own in arms.items() if own}
    options, used = rows[0]["options"], rows[0]["induced"]["options"]
    epochs = [at["epoch"] for at in rows[0]["induced"]["rows"]]
    courses = [course(arm, own, epoch) for arm, own in arms.items() for epoch in epochs]
    claims = [line for arm, own in arms.items() for line in claimed(arm, errors_of(own), epochs[0], epochs[-1])]
    return (
        study_origin(rows)
        + f"\nPGD-AT (PGD-{options['steps']}) of {network(options)} on {options['train_size']:,} CIFAR-10 images for "
        f"{options['epochs']} epochs. At each kept epoch PGD-{used['steps']} perturbs every image once; new networks "
        f"learn, in {used['net_epochs']} epochs, from {used['a_images']:,} perturbed images that the run was trained "
        f"on (A), from as many that it never saw (B), and from B as it is (clean). Error on {used['test_images']:,} "
        "test images, perturbed likewise or clean, means over the seeds; local dispersion in units of pixels.\n\n"
        + table(["schedule", "epoch", "IDE on A", "IDE on B", "clean", "robust gap of the run",
                 "dispersion on A", "on B", "on test images"], courses)
        + f"\nDifferences of errors in points, at epoch {epochs[-1]} or against epoch {epochs[0]}, and the claim that "
        "they are positive:\n\n"
        + table(["schedule", "difference", "points", "claim", ""], claims)
        + "\nThe paper (Tian & Mao) has A alone. A positive IDE on A minus IDE on B is a mismatch between training and "
        "test perturbations; a positive IDE on B minus clean is a distribution that is harder by itself. Networks "
        "and training sets this small decide nothing about large ones: `--scale gpu` has the paper's recipe.\n"
    )  # fmt: skip


def course(arm: str, rows: list[dict], epoch: int) -> tuple:
    """Return the line of an arm's means at an epoch."""
    found = [at for row in rows for at in row["induced"]["rows"] if at["epoch"] == epoch]

    def mean(value: Callable[[dict], float]) -> float:
        return statistics.fmean(value(at) for at in found)

    gaps = [at["gap"] for at in found if at["gap"] is not None]
    return (
        arm,
        epoch,
        *(percent(mean(lambda at, n=name: at["nets"][n]["error"])) for name in ("a", "b", "clean")),
        percent(statistics.fmean(gaps)) if gaps else "",
        *(f"{mean(lambda at, n=name: at['dispersion'][n]['mean']):.3g}" for name in ("a", "b", "test")),
    )


def claimed(arm: str, errors: Errors, first: int, last: int) -> list[tuple]:
    """Return an arm's lines of differences over paired seeds, each with its verdict."""

    def at(epoch: int, net: str) -> dict[int, float]:
        return {seed: by_epoch[epoch][net] for seed, by_epoch in errors.items()}

    compared = [
        ("IDE on A - clean", at(last, "a"), at(last, "clean"), "its adversarial examples are harder than clean images"),
        ("IDE on A - IDE on B", at(last, "a"), at(last, "b"), "training and test perturbations differ"),
        ("IDE on B - clean", at(last, "b"), at(last, "clean"), "they are harder without that difference"),
        (f"IDE on A, epoch {last} - {first}", at(last, "a"), at(first, "a"), "the paper: it rises with training"),
        (f"IDE on B, epoch {last} - {first}", at(last, "b"), at(first, "b"), "it rises without that difference"),
    ]
    lines = []
    for name, values, reference, meaning in compared:
        found = paired_interval(values, reference)
        lines.append((arm, name, points(found), verdict(found.differs, found.mean), meaning))
    return lines
