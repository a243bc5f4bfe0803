"""Random labels: which training methods memorise wrong labels, and the attack's share in an unstable gradient."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from at_extensions.analysis import gradient_instability, label_agreement
from at_extensions.analysis.gradient_stability import ZeroGradient
from at_extensions.attacks import PGD
from at_extensions.checks import check_count, check_name, check_number
from at_extensions.commands.train import build_method, build_model, load_splits
from at_extensions.data import NOISE_KINDS, Splits
from at_extensions.data.split import LabelledSplit
from at_extensions.evaluation import predictions
from at_extensions.experiments.cell import Cell
from at_extensions.experiments.running import StudyProgress, run_study
from at_extensions.experiments.study import Arm, Study
from at_extensions.experiments.summary import numbers, read_results
from at_extensions.methods import Method, TemporalEnsembling, list_methods, method_options
from at_extensions.models import load_model
from at_extensions.processes import own_device
from at_extensions.publishing.figures import save_png
from at_extensions.publishing.memorisation_plots import instability_by_rate, memorisation_by_rate
from at_extensions.runs import KINDS, RunDirectory, check_writable
from at_extensions.settings import RandomLabelsSettings, TrainSettings
from at_extensions.untouched import random_state_kept

METHODS = ("pgd", "trades", "standard")
RATES = (0.0, 0.5, 1.0)
QUESTION = "Which training methods memorise random labels, and does the attack make their gradient unstable?"

_BY_ARM = ("method", "label_noise")  # options of train in which the arms differ
_ATTACK = ("alpha", "steps")  # None for methods without an attack of several steps
_COMMON = ("data", "image_size", "train_size", "val_fraction", "data_seed", "model", "model_options", "eps", "steps",
           "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "schedule", "milestones", "augment",
           "precision")  # fmt: skip


@dataclass(frozen=True)
class Memorisation:
    """Measure how far a run has memorised its training labels, right and wrong, and how stable its gradient is.

    Results, all on the model in eval mode and fp32, for the last epoch and, where there is one, the best:

    - ``train``, ``kept``, ``flipped``: accuracy with regard to the labels trained on, clean and under PGD (Linf, step
      size eps / 4, against those labels), on all training images, on those with their true label and on the others.
      On flipped labels it is memorisation.
    - ``corrected``: the share of the flipped ones that the model assigns to their true class nonetheless.
    - ``test``: accuracy on the test images with their true labels.

    Of the last epoch alone: ``instability``, the curves of ``analysis.gradient_instability`` of the run's own method on
    a fixed batch of training images in the direction of the update, in units of the run's peak learning rate; with
    their value at s = 1 as ``instability_recomputed`` and ``instability_frozen``, and the difference, which is the
    attack's share, as ``instability_attack``. After temporal ensembling ``table_disagrees``, the share of samples whose
    averaged prediction is another class than their label, and ``table_auroc``, how well the table finds the flipped
    labels. Groups without images are absent.

    Attributes:
        pgd_steps: Steps of PGD.
        n_test: Test images at most, drawn evenly over the classes; all if None.
        n_instability: Training images behind the gradient at most; 0 leaves it out.
    """

    pgd_steps: int = 10
    n_test: int | None = 1000
    n_instability: int = 128

    def __post_init__(self) -> None:
        check_count("pgd_steps", self.pgd_steps)
        if self.n_test is not None:
            check_count("n_test", self.n_test)
        check_count("n_instability", self.n_instability, at_least=0)

    def __call__(self, run: RunDirectory, cell: Cell) -> dict[str, Any]:
        """Return the measurements as JSON types; run and global random state are left as they were."""
        with random_state_kept():
            return self._measure(run)

    def _measure(self, run: RunDirectory) -> dict[str, Any]:
        settings = TrainSettings.from_config(run.config())
        splits = load_splits(settings)
        flipped = splits.train.labels != splits.train.clean_labels
        result: dict[str, Any] = {"measured": asdict(self), "flipped_share": flipped.double().mean().item()}
        for kind in KINDS:
            if not run.weights(kind).is_file():
                continue
            if "last" in result and run.weights(kind).read_bytes() == run.weights("last").read_bytes():
                result[kind] = result["last"]
                continue
            result[kind] = self._accuracies(load_model(run.weights(kind)).to(own_device()), splits, settings.eps)
        method = _as_trained(run, settings, splits)
        return result | self._instability(method, settings, splits) | _table(method, splits.train)

    def _accuracies(self, model: nn.Module, splits: Splits, eps: float) -> dict[str, Any]:
        """Return the accuracies on training and test images, by group and attack."""
        train, test = splits.train, splits.test
        if self.n_test is not None and self.n_test < len(test):
            test = test.subset(self.n_test)
        found: dict[str, dict[str, Any]] = {}
        for name, attack in (("clean", None), (f"pgd{self.pgd_steps}", PGD(model, eps, eps / 4, self.pgd_steps))):
            groups = by_label(predictions(model, train, attack=attack), train.labels, train.clean_labels)
            groups["test"] = _share(predictions(model, test, attack=attack) == test.labels)
            for group, share in groups.items():
                found.setdefault(group, {})[name] = share
        return found

    def _instability(self, method: Method, settings: TrainSettings, splits: Splits) -> dict[str, Any]:
        """Return the curves and their values at s = 1; nothing where the gradient is zero."""
        if self.n_instability == 0:
            return {}
        order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
        index = order[: self.n_instability].sort().values
        x, y = (tensor.to(own_device()) for tensor in splits.train.select(index).tensors())
        try:
            found = gradient_instability(method.model, method, x, y, lr=settings.lr, index=index.to(x.device))
        except ZeroGradient:
            return {}
        at = found.steps.index(1.0)
        recomputed, frozen = found.recomputed.change[at], found.frozen.change[at]
        return {
            "instability": _finite(found.to_dict()),
            "instability_recomputed": recomputed,
            "instability_frozen": frozen,
            "instability_attack": recomputed - frozen,
        }


def by_label(predicted: Tensor, labels: Tensor, clean_labels: Tensor) -> dict[str, dict[str, Any]]:
    """Return how often predictions are the label, on all samples, kept and flipped ones, and the true class of those.

    Args:
        predicted: Predicted classes (N,).
        labels: Labels trained on (N,).
        clean_labels: True labels (N,).

    Returns:
        ``train``, ``kept``, ``flipped`` and ``corrected``, each with ``correct``, ``images`` and ``accuracy``; a
        group without samples is absent.
    """
    right, flipped = predicted == labels, labels != clean_labels
    groups = {
        "train": right,
        "kept": right[~flipped],
        "flipped": right[flipped],
        "corrected": (predicted == clean_labels)[flipped],
    }
    return {name: _share(verdicts) for name, verdicts in groups.items() if len(verdicts)}


def random_labels_study(
    methods: Sequence[str] = METHODS,
    rates: Sequence[float] = RATES,
    *,
    kind: str = "uniform",
    common: Mapping[str, Any] | None = None,
    scales: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    measure: Memorisation | None = None,
) -> Study:
    """Return the study of Dong et al. (ICLR 2022, arXiv 2106.01606): methods x rates of label noise.

    Its arms are named ``trades-r0.5``; each method is compared with the first one at the same rate. ``alpha`` and
    ``steps`` of ``common`` and ``scales`` reach the methods whose attack has several steps.

    Args:
        methods: Names of ``methods.list_methods()``.
        rates: Probabilities in [0, 1] that a training label is redrawn. Of one ``data_seed``, all rates have the same
            images, and the labels that a rate redraws are among those of a larger one.
        kind: ``"uniform"`` (over all classes) or ``"other"`` (never the true one).
        common: Options of ``train`` that all arms share.
        scales: As in ``Study``.
        seeds: As in ``Study``.
        measure: What is measured of each run; ``Memorisation()`` if None.

    Raises:
        ValueError: No methods, rates or seeds, an unknown method or kind, a rate outside [0, 1], anything twice, or an
            option that ``train`` does not have.
    """
    _check_once("method", [check_name("method", method, list_methods()) for method in methods])
    rates = [float(check_number("noise rate", rate, at_least=0, at_most=1)) for rate in rates]
    _check_once("noise rate", [f"{rate:g}" for rate in rates])
    check_name("label noise kind", kind, NOISE_KINDS)
    return Study(
        name="random_labels",
        question=QUESTION,
        arms={f"{method}-r{rate:g}": _arm(method, rate, kind) for rate in rates for method in methods},
        common=common or {},
        scales=scales or {},
        seeds=seeds,
        measure=Memorisation() if measure is None else measure,
        pairs=[(f"{method}-r{rate:g}", f"{methods[0]}-r{rate:g}") for rate in rates for method in methods[1:]],
    )


def random_labels(out: str | Path, settings: RandomLabelsSettings | None = None, **options: Any) -> StudyProgress:
    """Train on random labels by several methods, and measure what they memorise and how stable their gradient is.

    The study of Dong et al. (ICLR 2022, arXiv 2106.01606), by default at the size of minutes. Run again, it goes on
    where it stopped; several processes may share it. Writes a JSON for each run, ``summary.json``,
    ``memorisation.png`` and, unless it is left out, ``instability.png``.

    Args:
        out: Folder of results and figures, with the run directories in ``runs``.
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``RandomLabelsSettings``), such as ``methods=["te", "trades_te"]``.

    Returns:
        What became of the runs, with the summary of all results in the folder.

    Raises:
        ValueError, TypeError: Settings that cannot be right, or a folder with results of other settings.
        FileNotFoundError: No such data set.
        OSError: The folder cannot be written.
    """
    settings = RandomLabelsSettings.of(settings, options | {"out": str(out)})
    measure = Memorisation(settings.pgd_steps, settings.n_test, settings.n_instability)
    common = {name: getattr(settings, name) for name in _COMMON}
    common["alpha"] = _step_size(settings.eps, settings.steps) if settings.alpha is None else settings.alpha
    study = random_labels_study(
        settings.methods,
        settings.rates,
        kind=settings.label_noise_kind,
        common=common,
        seeds=settings.seeds,
        measure=measure,
    )
    check_writable(out)
    _check_results(study, measure, out)
    _check_buildable(study, settings.root)
    command = shlex.join(["at-extensions", "experiment", "random-labels", *settings.arguments()])
    progress = run_study(
        study,
        out,
        local={"root": settings.root, "progress": settings.progress},
        threads=settings.threads,
        command=command.replace("{", "{{").replace("}", "}}"),
    )
    write_figures(study, out)
    return progress


def write_figures(study: Study, results: str | Path) -> list[Path]:
    """Write ``memorisation.png`` and, where it was measured, ``instability.png`` of the results in a folder.

    Args:
        study: From ``random_labels_study``.
        results: The folder that ``run_study`` wrote.

    Returns:
        The paths of the figures; none without a result.
    """
    accuracies: dict[str, dict[float, list[dict[str, float]]]] = {}
    curves: dict[float, dict[str, list[dict[str, Any]]]] = {}
    place = {arm: number for number, arm in enumerate(study.every_arm)}
    rows = sorted(read_results(study, results), key=lambda row: place.get(row["arm"], len(place)))
    for row in rows:
        method, rate = row["options"]["method"], row["options"]["label_noise"]
        accuracies.setdefault(method, {}).setdefault(rate, []).append(numbers({"last": row["last"]}))
        if "instability" in row:
            curves.setdefault(rate, {}).setdefault(method, []).append(row["instability"])
    if not rows:
        return []
    pgd = next(name for name in rows[0]["last"]["train"] if name != "clean")
    written = [save_png(memorisation_by_rate(accuracies, pgd), Path(results) / "memorisation.png")]
    if curves:
        written.append(save_png(instability_by_rate(curves), Path(results) / "instability.png"))
    return written


def _arm(method: str, rate: float, kind: str) -> Arm:
    options = {"method": method, "label_noise": rate, "label_noise_kind": kind}
    if "steps" not in method_options(method):  # a method of one step or none keeps its own step size
        options |= {"steps": None, "alpha": None}
    return Arm(options, f"{method}, {100 * rate:g} % of the labels redrawn")


def _step_size(eps: float, steps: int) -> float:
    """Return a step size by which an attack can cross its ball: that of the papers for ten steps."""
    return max(eps / 4, 1.5 * eps / steps)


def _as_trained(run: RunDirectory, settings: TrainSettings, splits: Splits) -> Method:
    """Return the run's method with the weights and the memory of its last epoch."""
    method = build_method(settings, load_model(run.weights("last")).to(own_device()), splits)
    method.load_memory(run.load_state("last")["method"])
    return method


def _table(method: Method, train: LabelledSplit) -> dict[str, float]:
    """Return how temporal ensembling's table agrees with the labels; nothing of other methods or an empty table."""
    if not isinstance(method, TemporalEnsembling):
        return {}
    agreement = label_agreement(method.predictions(), train.labels, train.clean_labels)
    visited = ~agreement.agreement.isnan()
    if not visited.any():
        return {}
    found = {"table_disagrees": agreement.disagrees[visited].double().mean().item()}
    return found if agreement.auroc is None else found | {"table_auroc": agreement.auroc}


def _share(verdicts: Tensor) -> dict[str, Any]:
    right, total = int(verdicts.sum()), len(verdicts)
    return {"correct": right, "images": total, "accuracy": right / total}


def _finite(value: Any) -> Any:
    """Return plain data with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_once(what: str, given: Iterable[str]) -> None:
    given = list(given)
    if not given:
        raise ValueError(f"the study needs at least one {what}")
    for value in given:
        if given.count(value) > 1:
            raise ValueError(f"{what} {value} is given twice")


def _check_results(study: Study, measure: Memorisation, out: str | Path) -> None:
    """Refuse a folder with results of other settings: one summary and one figure show all of them."""
    own = _shared({**study.common, "label_noise_kind": next(iter(study.arms.values())).options["label_noise_kind"]})
    for row in read_results(study, out):
        pairs = [(own, _shared(row["options"])), (asdict(measure), row.get("measured", {}))]
        for now, before in pairs:
            for name in {**now, **before}:
                left_out = name in _ATTACK and before.get(name) is None
                if now.get(name) != before.get(name) and not left_out:
                    raise ValueError(
                        f"{out} holds results with {name} {before.get(name)!r}, now {now.get(name)!r}; choose another "
                        "folder, or repeat the old settings to go on"
                    )


def _shared(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _BY_ARM}


def _check_buildable(study: Study, root: str | None) -> None:
    """Build data, model and every method once, so that what cannot be right fails before anything is trained."""
    splits = net = None
    for cell in study.cells(seeds=study.seeds[:1]):
        settings = TrainSettings.from_dict({**cell.options, "root": root, "seed": cell.seed})
        if splits is None:
            splits = load_splits(settings)
            net = build_model(settings, splits)
        build_method(settings, net, splits)
