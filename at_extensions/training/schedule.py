"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from at_extensions.checks import check_count, check_name, check_number

OPTIMIZERS = ("sgd", "adamw", "deat")
SCHEDULES = ("onecycle", "step", "cosine", "constant")


def create_optimizer(
    model: nn.Module,
    name: str = "sgd",
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    **options: Any,
) -> Optimizer:
    """Build an optimiser for a model's parameters.

    Args:
        model: Whose parameters are trained.
        name: ``"sgd"`` and ``"adamw"`` through timm's factory, ``"deat"`` from ``at_extensions.optim``. Weight decay
            applies to every parameter, BatchNorm's included, as the papers' recipes have it.
        lr: Peak learning rate.
        momentum: Of SGD; the other optimisers ignore none of theirs for it.
        weight_decay: Weight decay.
        **options: More of the optimiser's own: ``k1``, ``k2``, ``decoupled``, ``foreach`` for DEAT, ``dampening`` for
            SGD, ``betas`` for AdamW, ...

    Raises:
        TypeError: An option that the optimiser does not have.
        ValueError: Unknown name or a number out of range.
    """
    check_name("optimizer", name, OPTIMIZERS)
    check_number("lr", lr, above=0)
    check_number("momentum", momentum, at_least=0, below=1)
    check_number("weight_decay", weight_decay, at_least=0)
    if name == "deat":
        from at_extensions.optim import DEAT

        return DEAT(model.parameters(), lr=lr, weight_decay=weight_decay, **options)
    from timm.optim import create_optimizer_v2

    # timm's "sgd" is Nesterov, "momentum" the plain form that the papers used
    opt = {"sgd": "momentum", "adamw": "adamw"}[name]
    return create_optimizer_v2(
        model, opt=opt, lr=lr, momentum=momentum, weight_decay=weight_decay, filter_bias_and_bn=False, **options
    )


def create_scheduler(
    optimizer: Optimizer,
    name: str = "onecycle",
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup: float = 0.5,
    milestones: Sequence[int] | None = None,
    gamma: float = 0.1,
) -> lr_scheduler.LRScheduler:
    """Build a schedule that advances once an optimiser step, as ``Trainer`` drives it.

    Args:
        optimizer: Its learning rate is the peak.
        name: ``"onecycle"`` (0 to the peak and back, linear), ``"step"``, ``"cosine"`` (to 0) or ``"constant"``.
        epochs: Length of the run.
        steps_per_epoch: Batches an epoch.
        warmup: Share of a one-cycle run in which the rate rises, in (0, 1).
        milestones: Epochs after which a step schedule multiplies by gamma; None means after 1/2 and 3/4 of the run.
        gamma: That factor.

    Raises:
        ValueError: Unknown name or a number out of range.
    """
    check_name("schedule", name, SCHEDULES)
    total = check_count("epochs", epochs) * check_count("steps_per_epoch", steps_per_epoch)
    if name == "onecycle":
        check_number("warmup", warmup, above=0, below=1)
        rise = max(1.0, warmup * total)

        def one_cycle(step: int) -> float:
            # the first step already moves: 1 of `rise`, the last one a step above zero
            return min(1.0, (step + 1) / rise, max(0.0, (total - step) / max(1.0, total - rise)))

        return lr_scheduler.LambdaLR(optimizer, one_cycle)
    if name == "step":
        milestones = milestones_of(name, epochs, milestones)
        check_number("gamma", gamma, above=0, at_most=1)
        return lr_scheduler.MultiStepLR(optimizer, [m * steps_per_epoch for m in milestones], gamma)
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, total)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


def milestones_of(name: str, epochs: int, milestones: Sequence[int] | None = None) -> list[int] | None:
    """Return the epochs after which a schedule reduces the rate at once; None for one that changes it smoothly.

    Args:
        name: As in ``create_scheduler``.
        epochs: Length of the run.
        milestones: Given ones; None means after 1/2 and 3/4 of the run.
    """
    if name != "step":
        return None
    return [max(1, epochs // 2), max(2, epochs * 3 // 4)] if milestones is None else list(milestones)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the first parameter group."""
    return float(optimizer.param_groups[0]["lr"])
