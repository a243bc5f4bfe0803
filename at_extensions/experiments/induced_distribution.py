"""The induced distribution experiment: networks that learn from a checkpoint's adversarial examples alone."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from at_extensions.analysis import local_dispersion
from at_extensions.attacks import PGD
from at_extensions.checks import check_count, check_device
from at_extensions.data.split import seeded_generator
from at_extensions.evaluation import state_digest
from at_extensions.experiments._induced_inputs import Inputs, open_inputs
from at_extensions.experiments._perturbed import PerturbedImages, PerturbedLoader, correct_of, perturb_images
from at_extensions.experiments.induced_errors import SETS, InducedDistribution, InducedErrors, NetError, finite
from at_extensions.methods import Standard
from at_extensions.models import fresh_like, recipe_of
from at_extensions.processes import launched, own_device
from at_extensions.progress import bar
from at_extensions.publishing.figures import save_png
from at_extensions.publishing.induced_plots import induced_errors
from at_extensions.runs import RunDirectory, check_writable, write_json
from at_extensions.settings import InducedDistributionSettings
from at_extensions.training.schedule import create_optimizer, create_scheduler
from at_extensions.training.trainer import Trainer
from at_extensions.untouched import random_state_kept, reseed

_WEIGHTS, _ORDER, _DROPOUT, _PROBE, _STARTS = range(5)  # streams of a seed; _STARTS + i for the sets
_NET = ("net_epochs", "lr", "weight_decay", "batch_size", "schedule", "milestones", "precision")
_ATTACK = ("steps", "exact", "zero_start", "starts", "probe", "holdout")
_ATTACKED = 250  # images attacked at a time


def induced_distribution(
    run: str | Path | RunDirectory,
    out: str | Path,
    settings: InducedDistributionSettings | None = None,
    **options: Any,
) -> InducedDistribution:
    """Train new networks on what checkpoints of an adversarially trained run do to images, with a held-out control.

    The induced distribution experiment of Tian & Mao (arXiv 2311.16526): every image is perturbed once by PGD against a
    frozen checkpoint theta_t (eval mode, true label, uniform random start, no augmentation, clipped to [0, 1]); a new
    network of the same architecture is trained by plain cross-entropy on the perturbed training images and tested on
    the perturbed test images. Its test error at the last epoch is the IDE error. The paper finds that it rises after
    robust overfitting has set in, and reads it as a harder distribution. (Their code leaves the clipping to the
    networks, which comes to the same but for pixels that reach 0 or 1 on the way.)

    **Ours are the controls.** theta_t was trained on the images whose perturbations form the training set, and not on
    the test images: after it has memorised the former, the two sets come from *different* operators, and a high IDE
    error may be that mismatch. So the run is trained on a part of the data, and there are

    - ``a``: perturbed images that theta_t was trained on, as in the paper (IDE_A);
    - ``b``: as many perturbed training images that it never saw, with the same number of every class (IDE_B);
    - ``clean``: the images of B as they are, tested on clean test images;
    - ``zero``, with ``zero_start``: as ``a``, with PGD from the image itself, whose dispersion is 0.

    IDE_A - IDE_B near IDE_A - clean means mismatch between training and test set; IDE_A - IDE_B near 0 supports the
    paper. All networks of a seed start from the same weights, which are not those that the run started from. Local
    dispersion (``analysis.local_dispersion``; its L2 norm is a *reconstruction*) and the attack's success are measured
    on A, B and the test images.

    ``holdout`` of the training data, validation images apart, must have been left out of the run's training: an
    adversarially trained run for ``holdout=0.5`` has ``train_size`` = half of the training images or less, and
    ``keep_every``. A and B have equal size.

    A checkpoint costs two trainings of ``net_epochs`` on A's size, three with zero starts; the clean network is trained
    once a seed. Each finished (epoch, seed) is one JSON file in ``out`` and is skipped by the next call. The run
    directory is only read.

    Args:
        run: A run directory with kept epochs.
        out: Folder for ``epoch-0010-seed0.json`` and others, ``induced_distribution.json`` and ``.png``.
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``InducedDistributionSettings``), such as ``epochs``, ``every``,
            ``holdout``, ``starts``, ``zero_start``, ``seeds``. With ``exact=False`` perturbations are kept as 8-bit
            multiples of eps / 127 (error at most eps / 254; exact at the ball's faces).

    Returns:
        Errors with intervals, paired differences, dispersion, attack success and the run's own robust gap, by epoch
        and seed.

    Raises:
        FileNotFoundError: No run, no kept epochs, or no data set.
        OSError: The folder cannot be written.
        TypeError: Settings of another kind.
        ValueError: Settings out of range; an epoch that was not kept, or fewer than two; checkpoints of different
            architectures; a run of label noise, or without a record of its training; too few images left out; another
            data set than the run's; a result in ``out`` of other settings, weights or images; a start under torchrun.
    """
    settings = InducedDistributionSettings.of(settings, {**options, "out": str(out)})
    if launched():
        raise ValueError("the experiment runs in one process; start it without torchrun")
    seeds = [0] if settings.seeds is None else [check_count("a seed", seed, at_least=0) for seed in settings.seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed may be given once, and one must be, got {seeds}")
    device = own_device() if settings.device is None else check_device(settings.device)
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    with random_state_kept():
        _check_schedule(settings)
        return _experiment(run, settings, Path(out), seeds, device)


def _experiment(
    run: RunDirectory, settings: InducedDistributionSettings, out: Path, seeds: list[int], device: torch.device
) -> InducedDistribution:
    """Measure each (epoch, seed) that has no result yet; write the summary and the figure."""
    inputs = open_inputs(run, settings)
    experiment = _Experiment(inputs, settings, check_writable(out), device)
    cells = [(epoch, seed) for epoch in inputs.checkpoints for seed in seeds]
    done = {cell: experiment.finished(*cell) for cell in cells}
    todo = [cell for cell, row in done.items() if row is None]
    for epoch, seed in bar(todo, "checkpoint and seed", show=settings.progress):
        done[epoch, seed] = experiment.measure(epoch, seed)
    result = InducedDistribution(tuple(done.values()), experiment.shared)
    write_json(out / "induced_distribution.json", result.to_dict())
    save_png(induced_errors(result.to_dict()["rows"]), out / "induced_distribution.png")
    return result


def _check_schedule(settings: InducedDistributionSettings) -> None:
    """Refuse a schedule that cannot be right before any work."""
    if settings.milestones is not None and settings.schedule != "step":
        raise ValueError(f"milestones are for schedule='step', got schedule={settings.schedule!r}")
    optimizer = create_optimizer(nn.Linear(1, 1), lr=settings.lr, weight_decay=settings.weight_decay)
    _scheduler(settings, optimizer, 1)


def _scheduler(settings: InducedDistributionSettings, optimizer: torch.optim.Optimizer, steps: int):
    return create_scheduler(
        optimizer,
        settings.schedule,
        epochs=settings.net_epochs,
        steps_per_epoch=steps,
        milestones=settings.milestones,
    )


class _Experiment:
    """The work on one run: each (epoch, seed) is measured by itself, and depends on nothing but the options."""

    def __init__(self, inputs: Inputs, settings: InducedDistributionSettings, out: Path, device: torch.device):
        self.inputs, self.settings, self.out, self.device = inputs, settings, out, device
        self.alpha = inputs.eps / 4 if settings.alpha is None else settings.alpha
        sizes = {f"{name}_images": len(found) for name, found in inputs.sets.items()}
        net = {name: getattr(settings, name) for name in _NET}
        self.of_nets = net | sizes | {"images": inputs.digest}
        self.shared = self.of_nets | {"eps": inputs.eps, "alpha": self.alpha}
        self.shared |= {name: getattr(settings, name) for name in _ATTACK}

    def finished(self, epoch: int, seed: int) -> InducedErrors | None:
        """Return the result in ``out``, or None where there is none yet.

        Raises:
            ValueError: It is damaged, or was measured with other options.
        """
        path = self._path(epoch, seed)
        if not path.exists():
            return None
        return InducedErrors.unpack(_read(path, self.shared | {"weights": state_digest(self.inputs.model(epoch))}))

    def measure(self, epoch: int, seed: int) -> InducedErrors:
        """Perturb all sets by the checkpoint of an epoch, train and test the networks, and write the result."""
        started, model = time.perf_counter(), self.inputs.model(epoch).to(self.device)
        attack = PGD(model, self.inputs.eps, self.alpha, self.settings.steps)
        perturbed = {name: self._perturbed(attack, name, seed) for name in SETS}
        success = {
            n: 1 - correct_of(model, found, self.device).double().mean().item() for n, found in perturbed.items()
        }
        nets = {name: self._net(model, perturbed[name], perturbed["test"], seed) for name in ("a", "b")}
        nets["clean"] = self._clean(model, seed)
        dispersion = {name: self._dispersion(attack, name, seed) for name in SETS}
        if self.settings.zero_start:
            fixed = PGD(model, self.inputs.eps, self.alpha, self.settings.steps, start="zero")
            a, test = (self._perturbed(fixed, name, seed) for name in ("a", "test"))
            nets["zero"] = self._net(model, a, test, seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* has no random start")  # it is the control
                dispersion["zero"] = self._dispersion(fixed, "test", seed, starts=2)
        gap = self.inputs.gaps.get(epoch)
        row = InducedErrors(epoch, seed, nets, dispersion, success, gap, time.perf_counter() - started)
        options = self.shared | {"weights": state_digest(model)}
        write_json(self._path(epoch, seed), row.pack() | {"options": options})
        return row

    def _path(self, epoch: int, seed: int) -> Path:
        return self.out / f"epoch-{epoch:04d}-seed{seed}.json"

    def _perturbed(self, attack: PGD, name: str, seed: int) -> PerturbedImages:
        return perturb_images(
            self.inputs.sets[name],
            attack,
            seed=_draw(seed, _STARTS + SETS.index(name)),
            batch_size=_ATTACKED,
            device=self.device,
            exact=self.settings.exact,
        )

    def _dispersion(self, attack: PGD, name: str, seed: int, starts: int | None = None) -> dict[str, Any]:
        """Return the local dispersion on a fixed sample of a set."""
        data, settings = self.inputs.sets[name], self.settings
        order = torch.randperm(len(data), generator=seeded_generator(0, _PROBE))
        x, y = data.batch(order[: settings.probe], self.device)
        found = local_dispersion(
            attack.model, attack, x, y, starts=starts or settings.starts, seed=_draw(seed, _PROBE), batch_size=64
        ).to_dict()
        return finite({k: v for k, v in found.items() if not k.startswith("per_sample")}) | {"images": len(x)}

    def _clean(self, model: nn.Module, seed: int) -> NetError:
        """Return the clean control on B, which no checkpoint enters: it is trained once a seed."""
        path, options = self.out / f"clean-seed{seed}.json", self.of_nets | {"recipe": recipe_of(model)}
        if path.exists():
            return NetError.unpack(_read(path, options))
        net = self._net(model, self.inputs.sets["b"], self.inputs.sets["test"], seed)
        write_json(path, net.pack() | {"options": options})
        return net

    def _net(self, like: nn.Module, train: PerturbedImages, test: PerturbedImages, seed: int) -> NetError:
        """Train a new network on fixed images, and test it."""
        settings, device = self.settings, self.device
        net = fresh_like(like, _draw(seed, _WEIGHTS)).train()
        loader = PerturbedLoader(train, settings.batch_size, seeded_generator(seed, _ORDER), device)
        optimizer = create_optimizer(net, lr=settings.lr, weight_decay=settings.weight_decay)
        reseed(_draw(seed, _DROPOUT))
        trainer = Trainer(
            Standard(net),
            optimizer,
            epochs=settings.net_epochs,
            scheduler=_scheduler(settings, optimizer, len(loader)),
            precision=settings.precision,
            val_attack=False,
            progress=False,
        )
        accuracy = trainer.fit(loader).rows[-1]["train_accuracy"]
        return NetError(correct_of(net.eval(), test, device), accuracy)


def _draw(seed: int, stream: int) -> int:
    """Return a seed for one purpose."""
    return seeded_generator(seed, stream).initial_seed()


def _read(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return a finished result, if it was measured with these options."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = found["options"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); delete it to measure anew") from error
    now = json.loads(json.dumps(options))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{path} was measured with {name} {before.get(name)!r}, now it is {now.get(name)!r}; choose another "
                "folder, or the same options"
            )
    return found
