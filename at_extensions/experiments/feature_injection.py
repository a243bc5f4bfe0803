"""Catastrophic overfitting induced by features of the data: a grid of amplitude, radius and method over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from at_extensions.checks import check_name, parse_fraction
from at_extensions.experiments.injected_accuracy import InjectedAccuracy
from at_extensions.experiments.running import StudyProgress, run_study
from at_extensions.experiments.study import Arm, Study
from at_extensions.experiments.summary import read_results
from at_extensions.intervals import wilson_interval
from at_extensions.methods import list_methods
from at_extensions.publishing import collapse_plots, figures
from at_extensions.runs import check_writable, write_json
from at_extensions.settings import InjectionSettings

QUESTION = (
    "Do discriminative features of small amplitude in the data make single-step training overfit catastrophically?"
)
_SHARED = (
    "data", "val_fraction", "train_size", "model", "model_options", "epochs", "batch_size", "lr", "val_steps",
    "precision",
)  # fmt: skip


@dataclass(frozen=True)
class CollapseRate:
    """How often the runs of one arm overfitted catastrophically.

    Attributes:
        arm: Name of the arm.
        method: Training method.
        beta: Amplitude of the features, 0 without any.
        eps: Linf radius.
        permuted: Whether the features were drawn at random: the control.
        collapsed: Runs that overfitted catastrophically.
        runs: All runs.
        interval: Wilson's 95 % interval of their share.
        robust: Mean PGD accuracy on the injected test images.
        fgsm: Mean FGSM accuracy on them.
        clean: Mean clean accuracy on them.
    """

    arm: str
    method: str
    beta: float
    eps: float
    permuted: bool
    collapsed: int
    runs: int
    interval: tuple[float, float]
    robust: float
    fgsm: float
    clean: float


@dataclass(frozen=True)
class FeatureInjection:
    """What injected features did to training.

    Attributes:
        rates: One row an arm, in the order of the study.
        progress: What became of the cells.
        files: ``collapse.json``, ``collapse.png`` and ``curves.png``.
    """

    rates: list[CollapseRate]
    progress: StudyProgress
    files: list[Path]

    def __repr__(self) -> str:
        return "\n".join([table(self.rates), *(f"  ! {n} failed: {e}" for n, e in self.progress.failed.items())])


def feature_injection(
    out: str | Path,
    settings: InjectionSettings | None = None,
    **options: Any,
) -> FeatureInjection:
    """Train on images with features of growing amplitude, and see where training overfits catastrophically.

    "Catastrophic overfitting can be induced with discriminative non-robust features" (Ortiz-Jimenez et al., TMLR 2023,
    arXiv 2206.08242): each image gets beta V_y, a pattern of its class (``data.carriers``), in training and test alike.
    Every run is measured by ``InjectedAccuracy``. Finished cells are skipped and an interrupted one goes on.

    Args:
        out: Folder of ``<arm>-seed<seed>.json``, ``summary.json``, ``collapse.json`` (rates with Wilson intervals),
            ``collapse.png``, ``curves.png`` and ``runs``.
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``InjectionSettings``).

    Returns:
        The rates of catastrophic overfitting.

    Raises:
        OSError: The folder cannot be written.
        TypeError, ValueError: Settings that cannot be right; results in the folder that were measured with others.
        RuntimeError: Every cell failed.
    """
    settings = InjectionSettings.of(settings, options)
    for method in settings.methods:
        check_name("method", method, list_methods())
    study = injection_study(settings)
    check_writable(out)
    local = {"progress": settings.progress} | ({} if settings.root is None else {"root": settings.root})
    progress = run_study(study, out, local=local, threads=settings.threads)
    if progress.summary is None:
        raise RuntimeError(f"no cell of the experiment has a result: {progress}")
    return FeatureInjection(write_collapses(study, out), progress, collapse_files(out))


def injection_study(settings: InjectionSettings) -> Study:
    """Return the grid of the experiment as a study: beta x eps x method, and the controls."""
    common = {name: getattr(settings, name) for name in _SHARED} | {"augment": "none", "inject_mode": settings.mode}
    arms = {}
    for method in settings.methods:
        for eps in settings.eps:
            for beta in settings.betas:
                for permuted in (False, True) if settings.control and beta else (False,):
                    name = _arm_name(method, beta, eps, permuted)
                    arms[name] = Arm(_options(settings, method, beta, eps, permuted))
    return Study(
        name="feature_injection",
        question=QUESTION,
        arms=arms,
        common=common | (settings.train_options or {}),
        seeds=settings.seeds,
        measure=InjectedAccuracy(settings.attack_steps, settings.test_size, settings.curvature_images),
    )


def collapse_rates(study: Study, results: str | Path) -> list[CollapseRate]:
    """Return how often each arm overfitted catastrophically, over the results so far, in the order of the study.

    Args:
        study: Measured by ``InjectedAccuracy``.
        results: Folder that ``run_study`` wrote.

    Raises:
        ValueError: A result that is damaged, or of another study.
    """
    by_arm: dict[str, list[dict]] = {}
    for row in read_results(study, results):
        by_arm.setdefault(row["arm"], []).append(row)
    return [_rate(name, by_arm[name]) for name in [*study.every_arm] if name in by_arm]


def write_collapses(study: Study, results: str | Path) -> list[CollapseRate]:
    """Write ``collapse.json``, ``collapse.png`` and ``curves.png`` beside the results; return the rates."""
    rates = collapse_rates(study, results)
    data, heat, curves = collapse_files(results)
    write_json(data, {"question": study.question, "rates": [asdict(rate) for rate in rates]})
    by_method: dict[str, list[dict]] = {}
    for rate in rates:
        by_method.setdefault(rate.method + (", permuted features" if rate.permuted else ""), []).append(asdict(rate))
    figures.save_png(collapse_plots.collapse_map(by_method), heat)
    rows = read_results(study, results)
    histories = {rate.arm: [row["epochs"] for row in rows if row["arm"] == rate.arm] for rate in rates}
    figures.save_png(collapse_plots.collapse_curves(histories), curves)
    return rates


def collapse_files(results: str | Path) -> list[Path]:
    """Return the paths of ``collapse.json``, ``collapse.png`` and ``curves.png``."""
    return [Path(results) / name for name in ("collapse.json", "collapse.png", "curves.png")]


def table(rates: Sequence[CollapseRate]) -> str:
    """Return the rates as a table."""
    lines = [f"{'arm':<34}{'clean':>8}{'FGSM':>8}{'PGD':>8}  collapsed"]
    for rate in rates:
        low, high = rate.interval
        lines.append(
            f"{rate.arm:<34}{rate.clean:>8.1%}{rate.fgsm:>8.1%}{rate.robust:>8.1%}  {rate.collapsed}/{rate.runs} "
            f"[{low:.2f}, {high:.2f}]"
        )
    return "\n".join(lines)


def _rate(name: str, rows: Sequence[Mapping[str, Any]]) -> CollapseRate:
    options = rows[0]["options"]
    collapsed = sum(row["collapsed"] for row in rows)
    pgd = next(key for key in rows[0]["injected"] if key.startswith("pgd"))
    return CollapseRate(
        arm=name,
        method=options.get("method", "pgd"),
        beta=parse_fraction(options.get("inject_beta") or 0),
        eps=parse_fraction(options["eps"]),
        permuted=bool(options.get("inject_permuted")),
        collapsed=collapsed,
        runs=len(rows),
        interval=wilson_interval(collapsed, len(rows)),
        **{
            attribute: statistics.fmean(row["injected"][attack]["accuracy"] for row in rows)
            for attribute, attack in (("robust", pgd), ("fgsm", "fgsm"), ("clean", "clean"))
        },
    )


def _options(settings: InjectionSettings, method: str, beta: float, eps: float, permuted: bool) -> dict[str, Any]:
    """Return an arm's options of ``train``; PGD-AT has steps of 2.5 eps / steps."""
    options = {"method": method, "eps": eps, "inject_beta": beta}
    if permuted:
        options["inject_permuted"] = True
    if method == "pgd":
        options |= {"steps": settings.pgd_steps, "alpha": 2.5 * eps / settings.pgd_steps}
    return options


def _arm_name(method: str, beta: float, eps: float, permuted: bool) -> str:
    return f"{method}-eps{255 * eps:.4g}-beta{255 * beta:.4g}" + ("-permuted" if permuted else "")
