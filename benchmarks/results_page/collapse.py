"""The sections of RESULTS.md on catastrophic overfitting: injected features, and the guard."""

from __future__ import annotations

import statistics
from pathlib import Path

from at_extensions.experiments import paired_interval, summarise
from at_extensions.experiments.feature_injection import collapse_rates
from at_extensions.experiments.summary import read_results
from reproduce import STUDIES
from results_page.learned import study_origin
from results_page.words import network, percent, points, table, verdict


def feature_injection(results: Path) -> str:
    folder, study = results / "feature_injection-cpu", STUDIES["feature_injection"]
    rows, rates = read_results(study, folder), collapse_rates(study, folder)
    options, lines = rows[0]["options"], []
    for rate in rates:
        of_arm = [row for row in rows if row["arm"] == rate.arm]
        curved = [row["input_curvature"] for row in of_arm if "input_curvature" in row]
        low, high = rate.interval
        training = f"`{rate.method}`" + (", patterns at random" if rate.permuted else "")
        share = f"{rate.collapsed} of {rate.runs} ({100 * low:.0f} to {100 * high:.0f} %)"
        lines.append((training, f"{255 * rate.beta:.3g}/255", percent(rate.clean), percent(rate.fgsm),
                      percent(rate.robust), share, f"{statistics.fmean(curved):.3g}" if curved else ""))  # fmt: skip
    fgsm = {rate.beta: rate for rate in rates if rate.method == "fgsm" and not rate.permuted}
    plain, induced = fgsm.get(0.0), [rate for beta, rate in fgsm.items() if beta > 0]
    claim = "not decided at this scale"
    if plain is not None and induced:
        worst = max(induced, key=lambda rate: rate.collapsed / rate.runs)
        apart = worst.interval[0] > plain.interval[1]
        claim = "holds" if apart else claim
    return (
        study_origin(rows)
        + f"\n{network(options)} on {options['train_size']:,} CIFAR-10 images, {options['epochs']} epochs at eps "
        f"{255 * options['eps']:.3g}/255; each image carries beta times a pattern of its class. Accuracy on injected "
        "test images, last epoch, means over the seeds; runs that collapsed, with Wilson's interval of their share; "
        "the largest eigenvalue of the input Hessian. Pictures lie in `results/feature_injection-cpu/`.\n\n"
        + table(["training", "beta", "clean", "FGSM", "PGD-20", "collapsed", "curvature"], lines)
        + f"\nThe claim that the features induce catastrophic overfitting where there is none without them: {claim}.\n"
    )


def collapse_guard(results: Path) -> str:
    folder, study = results / "collapse_guard-cpu", STUDIES["collapse_guard"]
    rows, summary = read_results(study, folder), summarise(study, folder)
    options, means = rows[0]["options"], summary.means
    lines = [
        (arm, percent(means[arm]["last/clean"]), percent(means[arm]["last/autoattack"]),
         ", ".join(str(len([e for epoch in row["epochs"] for e in epoch.get("events", []) if e["event"] == "rollback"]))
                   for row in rows if row["arm"] == arm))
        for arm in study.arms
        if arm in means
    ]  # fmt: skip
    text = (
        study_origin(rows)
        + f"\nRS-FGSM at eps {255 * options['eps']:.3g}/255: {network(options)} on {options['train_size']:,} CIFAR-10 "
        f"images, {options['epochs']} epochs. Last epoch: clean accuracy, standard AutoAttack on "
        f"{rows[0]['last']['autoattack']['images']} test images, means over the seeds; rollbacks of each seed.\n\n"
        + table(["training", "clean", "AutoAttack", "rollbacks"], lines)
    )
    if {"guarded", "unguarded"} <= means.keys():
        values = summary.values
        found = paired_interval(values["guarded"]["last/autoattack"], values["unguarded"]["last/autoattack"])
        text += f"\nGuarded minus unguarded, in points: {points(found)}; the claim that the guard keeps robustness: "
        text += f"{verdict(found.differs, found.mean)}.\n"
    return text
