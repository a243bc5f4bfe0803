"""The inputs of the induced distribution experiment, checked before any work: checkpoints, A, B and test images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from at_extensions.commands.train import load_splits
from at_extensions.data.long_tail import kept_samples
from at_extensions.data.split import LabelledSplit, Splits, seeded_generator
from at_extensions.experiments._perturbed import PerturbedImages, clean_images
from at_extensions.models import check_fits, load_model
from at_extensions.runs import OWN_CHECKPOINT, RunDirectory, read_recipe
from at_extensions.settings import InducedDistributionSettings, TrainSettings

_A, _B, _TEST = range(3)  # streams of the draws


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the experiment works on.

    Attributes:
        checkpoints: Epoch -> weights file.
        sets: ``"a"``, ``"b"`` and ``"test"``: clean images.
        digest: A hash of those images and labels.
        eps: Linf radius.
        gaps: Epoch -> robust training accuracy minus robust validation accuracy, where they were measured.
    """

    checkpoints: dict[int, Path]
    sets: dict[str, PerturbedImages]
    digest: str
    eps: float
    gaps: dict[int, float]

    def model(self, epoch: int) -> nn.Module:
        """Return the network of an epoch, in eval mode, on the CPU."""
        return load_model(self.checkpoints[epoch]).eval()


def open_inputs(run: RunDirectory, settings: InducedDistributionSettings) -> Inputs:
    """Read and check everything.

    Raises:
        FileNotFoundError: No run, no kept epochs, or no data set.
        ValueError: A run that the experiment cannot be made on; the message says which run could be.
    """
    trained = _settings_of(run)
    checkpoints = _checkpoints(run, settings)
    splits = _splits(run, trained, settings)
    a, b = _halves(run, trained, splits, settings)
    test = splits.test.subset(min(settings.test_images or len(splits.test), len(splits.test)))
    check_fits(load_model(next(iter(checkpoints.values()))), a[0][0], splits.name)
    sets = {"a": clean_images(a), "b": clean_images(b), "test": clean_images(test)}
    digest = hashlib.sha256()
    for found in sets.values():
        digest.update(found.images.contiguous().numpy().data)
        digest.update(found.labels.contiguous().numpy().data)
    eps = trained.eps if settings.eps is None else settings.eps
    return Inputs(checkpoints, sets, digest.hexdigest(), eps, _gaps(run, trained))


def _settings_of(run: RunDirectory) -> TrainSettings:
    config = run.config()
    if not config:
        raise FileNotFoundError(f"{run.path} holds no config.yaml; is it a run directory?")
    if config.get("method", {}).get("name") == OWN_CHECKPOINT:
        raise ValueError(
            f"{run.path} was made of a checkpoint whose training is not on record; the images that it was trained on "
            "and those that it never saw cannot be told apart. Train with at-extensions train"
        )
    try:
        trained = TrainSettings.from_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{run.path / 'config.yaml'}: {error}") from error
    if trained.label_noise is not None:
        raise ValueError(f"{run.path} was trained with label noise; perturbations are to follow the true labels")
    return trained


def _checkpoints(run: RunDirectory, settings: InducedDistributionSettings) -> dict[int, Path]:
    """Return the kept epochs to use, all of one architecture."""
    kept = run.kept()
    again = "train with --keep-every N (Trainer(keep_every=N)), such as a tenth of the epochs"
    if not kept:
        raise FileNotFoundError(f"{run.path} holds no kept epochs; {again}")
    if settings.epochs is not None and settings.every is not None:
        raise ValueError("give epochs or every, not both")
    if settings.epochs is not None:
        missing = [epoch for epoch in settings.epochs if epoch not in kept]
        if missing or not settings.epochs:
            raise ValueError(f"{run.path} kept no epoch {_listed(missing)}; it kept {_listed(kept)}")
        chosen = {epoch: kept[epoch] for epoch in sorted(set(settings.epochs))}
    else:
        every = settings.every or 1
        chosen = {epoch: path for epoch, path in kept.items() if epoch % every == 0}
        if len(chosen) < 2:
            raise ValueError(
                f"{run.path} kept the epochs {_listed(kept)}, of which {len(chosen)} would be used; a course over the "
                f"epochs needs two. {again[0].upper()}{again[1:]}, or name single ones by epochs"
            )
    recipes = {epoch: read_recipe(path) for epoch, path in chosen.items()}
    (first, recipe), *others = recipes.items()
    if recipe is None:
        raise ValueError(f"{chosen[first]} names no recipe, so no new network of its architecture can be made")
    for epoch, other in others:
        if other != recipe:
            raise ValueError(
                f"the checkpoints are of different architectures: epoch {first} is {recipe}, epoch {epoch} is {other}"
            )
    return chosen


def _splits(run: RunDirectory, trained: TrainSettings, settings: InducedDistributionSettings) -> Splits:
    """Return the run's splits, with all of the training images that it could have been trained on."""
    elsewhere = {name: getattr(settings, name) for name in ("data", "root") if getattr(settings, name) is not None}
    trained = replace(trained, train_size=None, **elsewhere)
    try:
        return load_splits(trained)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the data set of {run.path} is needed again: {error}; data= names another place"
        ) from error


def _halves(
    run: RunDirectory, trained: TrainSettings, splits: Splits, settings: InducedDistributionSettings
) -> tuple[LabelledSplit, LabelledSplit]:
    """Return A, of images that the run was trained on, and B, of training images that it never saw: classes alike."""
    everything = splits.train
    needed = int(settings.holdout * len(everything))
    size = len(everything) if trained.train_size is None else trained.train_size
    left = len(everything) - size
    if left < max(1, needed):
        most = len(everything) - needed
        smaller = f", or take a holdout of at most {left / len(everything):.3f}" if left > 0 else ""
        raise ValueError(
            f"{run.path} was trained on {size} of {len(everything)} training images, which leaves {left} that it never "
            f"saw; holdout {settings.holdout:g} needs {max(1, needed)}: train with --train-size {most} or less{smaller}"
        )
    trained_on, never_seen = everything.divide(size, seed=trained.data_seed)
    recorded = run.config().get("data", {}).get("class_counts")
    if recorded is not None and trained_on.class_counts != list(recorded):
        raise ValueError(
            f"{run.path} was trained on {recorded} images of each class, {trained.data!r} gives "
            f"{trained_on.class_counts}: it is another data set"
        )
    count = min(len(trained_on), needed, settings.images or len(trained_on))
    a, b = trained_on.subset(count), never_seen.subset(count)
    return _alike(a, b, everything)


def _alike(a: LabelledSplit, b: LabelledSplit, everything: LabelledSplit) -> tuple[LabelledSplit, LabelledSplit]:
    """Cut two splits to the same number of every class."""
    counts = [min(pair) for pair in zip(a.class_counts, b.class_counts)]
    absent = [c for c, total in enumerate(everything.class_counts) if total and not counts[c]]
    if absent:
        raise ValueError(
            f"class {absent[0]} has {a.class_counts[absent[0]]} images in A and {b.class_counts[absent[0]]} in B, of "
            f"{sum(a.class_counts)} and {sum(b.class_counts)}; both need every class: use more images, or train with a "
            "smaller --train-size"
        )
    if counts == a.class_counts == b.class_counts:
        return a, b
    return tuple(
        split.select(kept_samples(split.labels, counts, seeded_generator(0, stream)))
        for split, stream in ((a, _A), (b, _B))
    )


def _gaps(run: RunDirectory, trained: TrainSettings) -> dict[int, float]:
    if trained.method == "standard":  # its training accuracy is of clean images
        return {}
    keys = ("train_accuracy", "val_robust_accuracy")
    return {row["epoch"]: row[keys[0]] - row[keys[1]] for row in run.metrics() if all(key in row for key in keys)}


def _listed(epochs) -> str:
    return ", ".join(str(epoch) for epoch in epochs) or "at all"
