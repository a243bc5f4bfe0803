"""Temporal ensembling: a penalty that ties predictions to their average over past epochs, in attack and loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from at_extensions.attacks import Loss
from at_extensions.checks import check_count, check_number
from at_extensions.methods.method import Method, Step, check_takes_loss
from at_extensions.methods.pgd import PGDAT
from at_extensions.methods.registry import register
from at_extensions.methods.trades import TRADES
from at_extensions.methods.wrapping import Wrapping
from at_extensions.processes import add_over_ranks, max_over_ranks, rank, world_size

DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""Precisions that the table can be kept in."""


class TemporalEnsembling(Wrapping):
    """Temporal ensembling in adversarial training (Dong et al., ICLR 2022, arXiv 2106.01606), around another method.

    A table z (N, K) holds an average of each training sample's clean predictions p = softmax f(x), taken in eval mode
    of this step's augmented image. From epoch ``start`` on, before the attack,

        z_i <- momentum z_i + (1 - momentum) p_i,    zhat_i = z_i / sum_k z_ik,
        R(logits) = w(e) mean_{i, k} (softmax(logits)_ik - zhat_ik)^2,
        w(e) = weight exp(-5 (1 - (e - start) / (end - start))^2) up to epoch ``end``, then weight.

    The attack maximises the inner method's attack loss (as a mean over the batch) plus R; training adds R to the loss,
    on the adversarial logits, or on the clean ones where the inner method forwards clean images in training (TRADES).
    Before ``start`` it is the inner method alone. A sample that a batch holds more than once enters the table once,
    with its mean prediction.

    Memory: ``num_samples * num_classes`` numbers. It is part of the state dict; ``DistributedDataParallel`` leaves it
    alone, and ``epoch_end()`` combines the processes' rows by visits.

    Args:
        base: The method inside: ``PGDAT`` and ``TRADES`` are the paper's; any whose attack takes a loss.
        num_samples: Training samples N; their indices lie in [0, N).
        num_classes: Classes K.
        momentum: Of the average, in [0, 1).
        weight: Largest weight of R, at least 0.
        start: First epoch with the penalty, from 1.
        end: Epoch from which its weight is full; at least ``start``.
        epochs: Length of the run: where start or end is None, they are 0.45 and 0.75 of it (the paper: 90 and 150 of
            200).
        milestones: Epochs after which the learning rate is reduced, where they are known: where start or end is None,
            they are then 0.9 of the first and the second of them (the paper's own 90 and 150 of 100 and 150), since
            the penalty should set in before the first reduction.
        table_dtype: ``"float32"`` or ``"float16"``.

    Attributes:
        epoch: Number of the running epoch, from 1; ``epoch_end()`` counts it.
        table: z (N, K).

    Raises:
        TypeError: Not a method.
        ValueError: A number out of range, neither start and end nor epochs, or an attack that takes no loss.
    """

    needs_index = True

    def __init__(
        self,
        base: Method,
        num_samples: int,
        num_classes: int,
        *,
        momentum: float = 0.9,
        weight: float = 300.0,
        start: int | None = None,
        end: int | None = None,
        epochs: int | None = None,
        milestones: Sequence[int] | None = None,
        table_dtype: str = "float32",
    ):
        super().__init__(base)
        check_takes_loss(base.attack, "TemporalEnsembling")
        self.momentum = check_number("momentum", momentum, at_least=0, below=1)
        self.weight = check_number("weight", weight, at_least=0)
        self.start, self.end = _limits(start, end, epochs, milestones)
        if table_dtype not in DTYPES:
            raise ValueError(f"table_dtype must be one of {', '.join(DTYPES)}, got {table_dtype!r}")
        self.epoch = 1
        self._average: Tensor | None = None
        shape = check_count("num_samples", num_samples), check_count("num_classes", num_classes, at_least=2)
        device = next((p.device for p in base.model.parameters()), None)
        self.register_local_buffer("table", torch.zeros(shape, dtype=DTYPES[table_dtype], device=device))
        self.register_local_buffer("visits", torch.zeros(shape[0], dtype=torch.int32, device=device))

    def ramp(self, epoch: int | None = None) -> float:
        """Return w(e) of an epoch, the running one by default."""
        epoch = self.epoch if epoch is None else epoch
        if epoch < self.start:
            return 0.0
        if epoch >= self.end:
            return float(self.weight)
        return self.weight * math.exp(-5 * (1 - (epoch - self.start) / (self.end - self.start)) ** 2)

    def predictions(self) -> Tensor:
        """Return zhat (N, K), in float32; rows of zeros for samples that were never visited."""
        table = self.table.float()
        return table / table.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    def attack_loss(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Loss | None:
        """Update the table with the batch and return the inner attack's loss plus R."""
        self._average = None
        if self.epoch < self.start:
            return self.inner.attack_loss(x, y, index)
        self._average = average = self._update(self.clean_logits(x), index)
        inner, weight = self.inner_attack_loss(x, y, index), self.ramp()
        return lambda logits: inner(logits) + weight * _penalty(logits, average)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Return the inner method's step plus R."""
        step = self.inner.loss(x, x_adv, y, index)
        if self._average is None:
            return step
        logits = step.logits if step.clean_logits is None else step.clean_logits
        return step.plus("ensembling", self.ramp() * _penalty(logits, self._average))

    @torch.no_grad()
    def _update(self, logits: Tensor, index: Tensor) -> Tensor:
        """Bring the batch's predictions into the table and return zhat (B, K)."""
        rows = len(self.table)
        if logits.shape[1] != self.table.shape[1]:
            raise ValueError(f"the table has {self.table.shape[1]} classes, the model {logits.shape[1]}")
        index = index.to(self.table.device)
        outside = (index < 0) | (index >= rows)
        self.flag(f"training samples numbered outside the table of {rows} rows", outside.any())
        index = index.clamp(0, rows - 1)
        same = (index.unsqueeze(1) == index) & ~outside  # (B, B): the places of a sample in this batch
        p = logits.float().softmax(1)
        mean = same.float() @ p / same.sum(1, keepdim=True).clamp_min(1)
        seen = self.table[index].float()
        averaged = torch.where(same.any(1, keepdim=True), self.momentum * seen + (1 - self.momentum) * mean, seen)
        self.table[index] = averaged.to(self.table.dtype)  # repeats write the same row
        self.visits[index] = self.visits[index] + same.any(1).int()
        total = averaged.sum(1, keepdim=True)
        return torch.where(total > 0, averaged / total.clamp_min(torch.finfo(torch.float32).tiny), p)

    def epoch_end(self) -> None:
        """Count the epoch; over several processes, take each row from the one that visited it most."""
        super().epoch_end()
        self.epoch += 1
        if world_size() > 1:
            # ties go to the lowest rank: visits * world + (world - 1 - rank) is different on every process
            claim = self.visits.long() * world_size() + (world_size() - 1 - rank())
            mine = claim == max_over_ranks(claim.clone())
            table = torch.where(mine.unsqueeze(1), self.table, torch.zeros_like(self.table)).float()
            self.table.copy_(add_over_ranks(table))
        self.visits.zero_()

    def get_extra_state(self) -> dict:
        """Return the random streams' positions and the epoch, for the state dict."""
        return super().get_extra_state() | {"epoch": self.epoch}

    def set_extra_state(self, state: dict) -> None:
        """Continue from a state dict."""
        super().set_extra_state({key: value for key, value in state.items() if key != "epoch"})
        self.epoch = int(state["epoch"])


def _limits(
    start: int | None, end: int | None, epochs: int | None, milestones: Sequence[int] | None
) -> tuple[int, int]:
    """Return the first epoch with the penalty and the first with all of it."""
    drops = sorted(check_count("milestones", m) for m in milestones or ())
    if epochs is not None:
        check_count("epochs", epochs)
    if start is None and (drops or epochs):
        start = max(1, round(0.9 * drops[0] if drops else 0.45 * epochs))
    if end is None and (len(drops) > 1 or epochs):
        end = max(start, drops[1] if len(drops) > 1 else round(0.75 * epochs))
    if start is None or end is None:
        raise ValueError("give start and end in epochs, or the run's length as epochs=")
    check_count("start", start)
    if check_count("end", end) < start:
        raise ValueError(f"end must not come before start, got {start} and {end}")
    return start, end


def _penalty(logits: Tensor, average: Tensor) -> Tensor:
    """Return the mean over samples and classes of (softmax(logits) - zhat)^2, in float32 at least."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.mse_loss(logits.to(precise).softmax(1), average.to(precise))


@register("te", "PGD-AT with temporal ensembling (Dong et al. 2022): predictions are tied to their average over epochs")
def te(
    model: nn.Module,
    num_samples: int,
    num_classes: int,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    momentum: float = 0.9,
    weight: float = 300.0,
    te_start: int | None = None,
    te_end: int | None = None,
    epochs: int | None = None,
    milestones: Sequence[int] | None = None,
    table_dtype: str = "float32",
    twin: bool | str = "auto",
    seed: int = 0,
) -> TemporalEnsembling:
    """Build ``TemporalEnsembling(PGDAT(model))``."""
    base = PGDAT(model, eps=eps, alpha=alpha, steps=steps, twin=twin, seed=seed)
    return TemporalEnsembling(
        base, num_samples, num_classes, momentum=momentum, weight=weight, start=te_start, end=te_end, epochs=epochs,
        milestones=milestones, table_dtype=table_dtype,
    )  # fmt: skip


@register("trades_te", "TRADES with temporal ensembling (Dong et al. 2022), the penalty on clean predictions")
def trades_te(
    model: nn.Module,
    num_samples: int,
    num_classes: int,
    *,
    beta: float = 6.0,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    momentum: float = 0.9,
    weight: float = 300.0,
    te_start: int | None = None,
    te_end: int | None = None,
    epochs: int | None = None,
    milestones: Sequence[int] | None = None,
    table_dtype: str = "float32",
    twin: bool | str = "auto",
    seed: int = 0,
) -> TemporalEnsembling:
    """Build ``TemporalEnsembling(TRADES(model))``."""
    base = TRADES(model, beta=beta, eps=eps, alpha=alpha, steps=steps, twin=twin, seed=seed)
    return TemporalEnsembling(
        base, num_samples, num_classes, momentum=momentum, weight=weight, start=te_start, end=te_end, epochs=epochs,
        milestones=milestones, table_dtype=table_dtype,
    )  # fmt: skip
