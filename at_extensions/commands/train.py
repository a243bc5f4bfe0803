"""A whole training run from its settings: data, model, method, optimiser, schedule, trainer, run directory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from at_extensions import processes
from at_extensions.attacks import PGD
from at_extensions.data import Injection, Splits, is_long_tailed, load_dataset, make_loader, with_label_noise
from at_extensions.methods import Method, create_method
from at_extensions.models import check_fits, create_model
from at_extensions.runs import RunDirectory, check_writable, versions
from at_extensions.settings import TrainSettings
from at_extensions.training.observers import CollapseGuard
from at_extensions.training.schedule import create_optimizer, create_scheduler, milestones_of
from at_extensions.training.trainer import Trainer

VAL_BATCH = 500
_TRAINER = ("epochs", "precision", "channels_last", "compile", "ema", "clip_grad", "keep_every", "resume", "seed",
            "progress")  # fmt: skip


def train(out: str | Path, settings: TrainSettings | None = None, **options: Any) -> RunDirectory:
    """Train a classifier adversarially and keep everything about it in a run directory.

    Started again with the same settings, an interrupted run goes on where it was. Under torchrun the batch is shared
    out over the processes.

    Args:
        out: The run directory.
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``TrainSettings``), such as ``data="digits", eps="8/255"``; the recipe
            of a paper is ``**preset("deat")``.

    Returns:
        The run directory.

    Raises:
        ValueError, TypeError, FileNotFoundError: Settings that cannot be right; each says what to do.
        OSError: The folder cannot be written.
        FloatingPointError: The loss was not finite; the last checkpoint is whole.
    """
    settings = TrainSettings.of(settings, options)
    check_writable(out)
    with processes.connected() as device:
        _fit(out, settings, device)
    return RunDirectory(out)


def _fit(out: str | Path, settings: TrainSettings, device: torch.device) -> None:
    """Build everything that the settings name, and train."""
    splits = load_splits(settings)
    net = build_model(settings, splits).to(device)
    method = build_method(settings, net, splits)
    train_batches, val_batches = _loaders(settings, splits, device)
    optimizer = create_optimizer(
        net,
        settings.optimizer,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        **(settings.optimizer_options or {}),
    )
    scheduler = create_scheduler(
        optimizer,
        settings.schedule,
        steps_per_epoch=len(train_batches),
        epochs=settings.epochs,
        warmup=settings.warmup,
        milestones=settings.milestones,
    )
    eps, steps = settings.eps, settings.val_steps
    config = settings.to_config(net.recipe) | {"versions": versions()}
    config["data"]["class_counts"] = splits.class_counts
    trainer = Trainer(
        method,
        optimizer,
        scheduler=scheduler,
        val_attack=lambda m: PGD(m, eps=eps, alpha=2.5 * eps / steps, steps=steps, image_range=method.image_range),
        run_dir=out,
        config=config,
        class_counts=splits.class_counts if is_long_tailed(splits.class_counts) else None,
        observers=_guards(settings, splits),
        **{name: getattr(settings, name) for name in _TRAINER},
    )
    trainer.fit(train_batches, val_batches)


def _guards(settings: TrainSettings, splits: Splits) -> list[CollapseGuard]:
    """Return the guard against catastrophic overfitting, where one is asked for."""
    if settings.guard is None:
        if settings.guard_remedy is not None:
            raise ValueError("guard_remedy follows a rollback; give guard=rollback with it")
        return []
    if settings.guard_remedy is not None and settings.guard != "rollback":
        raise ValueError(f"guard_remedy follows a rollback; guard={settings.guard} has none")
    if splits.val is None:
        raise ValueError("the guard attacks held-out images; give val_fraction above 0")
    return [CollapseGuard(action=settings.guard, remedy=settings.guard_remedy or "n_fgsm", seed=settings.seed)]


def load_splits(settings: TrainSettings) -> Splits:
    """Return the data of a run: read, split, cut to a tail, to ``train_size``, with label noise and injected features.

    Runs that differ in label noise alone have the same images.

    Raises:
        ValueError, TypeError, FileNotFoundError: As ``load_dataset``.
    """
    splits = load_dataset(
        settings.data,
        root=settings.root,
        val_fraction=settings.val_fraction,
        imbalance_ratio=settings.imbalance_ratio,
        imbalance_kind=settings.imbalance_kind,
        image_size=settings.image_size,
        seed=settings.data_seed,
    )
    if settings.train_size is not None:
        splits.train = splits.train.subset(settings.train_size, seed=settings.data_seed)
    if settings.label_noise is not None:
        noise = settings.label_noise, settings.label_noise_kind
        splits.train = with_label_noise(splits.train, noise, settings.data_seed)
    splits.class_counts = splits.train.class_counts
    return splits if settings.inject_beta is None else _injected(settings, splits)


def _injected(settings: TrainSettings, splits: Splits) -> Splits:
    """Return the data with features in all images; last of all, so that only images in use become floats."""
    if settings.augment != "none":
        warnings.warn(
            f"augment={settings.augment!r} moves and mirrors the injected patterns; the paper trains with 'none'",
            stacklevel=5,
        )
    injection = Injection(settings.inject_beta, settings.inject_mode, settings.inject_permuted, settings.inject_seed)
    return injection.into(splits)


def build_model(settings: TrainSettings, splits: Splits) -> nn.Module:
    """Return a run's model before training; its weights depend on the seed alone.

    Raises:
        ValueError, TypeError: It cannot be built, or does not take the data's images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(settings.seed)
        net = create_model(
            settings.model,
            splits.num_classes,
            mean=settings.mean,
            std=settings.std,
            in_chans=splits.image_shape[0],
            **(settings.model_options or {}),
        )
    return check_fits(net, splits.train[0][0], settings.data)


def build_method(settings: TrainSettings, net: nn.Module, splits: Splits) -> Method:
    """Return a run's method around a model, with those of the common options that were given or that it takes.

    Raises:
        ValueError, TypeError: An unknown method, or an option that it does not have or that is out of range.
    """
    given = {"alpha": settings.alpha, "steps": settings.steps}
    options = (settings.method_options or {}) | {name: value for name, value in given.items() if value is not None}
    offered = {
        "eps": settings.eps,
        "seed": settings.seed,
        "class_counts": splits.class_counts,
        "num_classes": splits.num_classes,
        "epochs": settings.epochs,
        "milestones": milestones_of(settings.schedule, settings.epochs, settings.milestones),
    }
    if hasattr(splits.train, "__len__"):
        offered["num_samples"] = len(splits.train)
    method = create_method(settings.method, net, offered=offered, **options)
    method.image_range = splits.image_range
    return method


def _loaders(settings: TrainSettings, splits: Splits, device: torch.device):
    world = processes.world_size()
    if settings.batch_size % world:
        raise ValueError(f"batch_size {settings.batch_size} cannot be shared out over {world} processes")
    shared = {"device": device, "rank": processes.rank(), "world_size": world}
    train_batches = make_loader(
        splits.train,
        settings.batch_size // world,
        augment=settings.augment,
        generator=torch.Generator().manual_seed(settings.seed),
        drop_last=len(splits.train) >= settings.batch_size,
        **shared,
    )
    if splits.val is None:
        return train_batches, None
    return train_batches, make_loader(splits.val, VAL_BATCH, shuffle=False, **shared)
