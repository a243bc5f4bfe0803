"""Diffusion of SGD and DEAT: the displacement of the weights by gradients and by gradient noise.

An optimiser that is linear in its gradients moves by -lr sum_k c_k g_{t-k}. With white gradient noise of variance v

- its *effective learning rate* is lr sum_k c_k: many steps move by minus this times the sum of all gradients;
- *one step* has noise of variance v lr^2 sum_k c_k^2;
- over a *long run*, the noise is v (lr sum_k c_k)^2 per step: parts that alternate in sign have cancelled.

The stochastic differential equation of SGD, d theta = -grad dt + sqrt(lr/b) B dW, puts lr/b into one unit of drift. An
optimiser's noise per drift is therefore the lr/b at which plain SGD has the same, in one step or over a long run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torchattacks.attack import Attack

from at_extensions.attacks import RandomStream, attacking, check_attack, perturb
from at_extensions.checks import check_count, check_images, check_labels, check_model, check_number, device_of
from at_extensions.optim import DEAT


@dataclasses.dataclass(frozen=True, repr=False)
class Diffusion:
    """Displacement of the weights by gradients and by their noise; the module's docstring defines the terms.

    Attributes:
        optimizer: Name and options of the optimiser.
        lr: Nominal learning rate.
        batch_size: Samples b behind a gradient.
        noise: Variance of a gradient, the unit of the two variances below.
        effective_lr: Displacement over many steps per unit of summed gradient.
        one_step_variance: Variance of the displacement in one step.
        long_run_variance: Variance of the displacement over many steps, divided by their number.
        lr_batch_ratio: Nominal lr / b, the paper's measure of diffusion.
        one_step_ratio: lr / b at which plain SGD has the same noise in one step for the same drift.
        long_run_ratio: lr / b at which plain SGD has the same noise over a long run for the same drift.
    """

    optimizer: str
    lr: float
    batch_size: int
    noise: float
    effective_lr: float
    one_step_variance: float
    long_run_variance: float
    lr_batch_ratio: float
    one_step_ratio: float
    long_run_ratio: float

    def to_dict(self) -> dict[str, str | int | float]:
        """Return every attribute by name."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        rows = (
            ("effective lr", self.effective_lr, ""),
            ("noise in a step", self.one_step_variance, f"as plain SGD at lr/b {self.one_step_ratio:.4g}"),
            ("in a long run", self.long_run_variance, f"as plain SGD at lr/b {self.long_run_ratio:.4g}"),
        )
        head = f"Diffusion: {self.optimizer}, batch {self.batch_size}, lr/b {self.lr_batch_ratio:.4g}"
        return "\n".join([head, *(f"  {name:<16}{value:>10.4g}   {note}".rstrip() for name, value, note in rows)])


def effective_lr(optimizer: Optimizer, *, group: int = 0) -> float:
    """Return the displacement over many steps per unit of summed gradient, without weight decay.

    Plain SGD: lr. SGD with momentum mu and dampening tau: lr (1 - tau) / (1 - mu), with the same with Nesterov's. DEAT:
    lr / sqrt((1 + k1)^2 + k1^2). At equal nominal lr, SGD with momentum 0.9 therefore moves 22 times as far as DEAT.

    Args:
        optimizer: ``torch.optim.SGD`` or ``DEAT``.
        group: Index of the parameter group.

    Raises:
        TypeError: Another optimiser.
        ValueError: No such group, or a momentum or dampening of 1 or more.
    """
    options = _options(optimizer, group)
    return float(options["lr"]) * _response(optimizer, options)[0]


def matched_lr(optimizer_a: Optimizer, optimizer_b: Optimizer, *, group: int = 0) -> float:
    """Return the nominal lr at which ``optimizer_b`` has the present effective lr of ``optimizer_a``.

    Args:
        optimizer_a: ``torch.optim.SGD`` or ``DEAT``, at the lr to match.
        optimizer_b: ``torch.optim.SGD`` or ``DEAT``; its own lr is not used.
        group: Index of the parameter group in each.

    Raises:
        TypeError: Another optimiser.
        ValueError: No such group, or a momentum or dampening of 1 or more.

    Example:
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        >>> matched_lr(sgd, DEAT(model.parameters(), lr=1.0))  # 0.01 * 10 * sqrt(5)
        0.2236...
    """
    return effective_lr(optimizer_a, group=group) / _response(optimizer_b, _options(optimizer_b, group))[0]


def diffusion(optimizer: Optimizer, batch_size: int, *, noise: float = 1.0, group: int = 0) -> Diffusion:
    """Return the diffusion of an optimiser at its present lr, for gradient noise that is white in time.

    Args:
        optimizer: ``torch.optim.SGD`` (plain, with momentum, dampened or Nesterov) or ``DEAT``.
        batch_size: Samples per gradient, over all processes.
        noise: Variance of a gradient. With 1, the variances are in units of it; with ``gradient_noise(...).variance``
            they are absolute (summed over the weights).
        group: Index of the parameter group.

    Raises:
        TypeError: Another optimiser.
        ValueError: No such group, a momentum or dampening of 1 or more, or a number out of range.
    """
    check_count("batch_size", batch_size)
    check_number("noise", noise, at_least=0)
    options = _options(optimizer, group)
    drift, energy = _response(optimizer, options)
    lr = float(options["lr"])
    shown = ("lr", *(("k1", "k2") if isinstance(optimizer, DEAT) else ("momentum", "dampening", "nesterov")))
    described = ", ".join(f"{k}={float(options[k]):g}" for k in shown if k == "lr" or options[k])
    return Diffusion(
        optimizer=f"{type(optimizer).__name__}({described})",
        lr=lr,
        batch_size=batch_size,
        noise=float(noise),
        effective_lr=lr * drift,
        one_step_variance=lr**2 * energy * noise,
        long_run_variance=(lr * drift) ** 2 * noise,
        lr_batch_ratio=lr / batch_size,
        one_step_ratio=lr * energy / drift / batch_size,
        long_run_ratio=lr * drift / batch_size,
    )


def _options(optimizer: Optimizer, group: int) -> dict:
    if not isinstance(optimizer, (SGD, DEAT)):
        known = "torch.optim.SGD (plain or with momentum) and DEAT"
        raise TypeError(f"an effective learning rate is known for {known}, not for {type(optimizer).__name__}")
    count = len(optimizer.param_groups)
    if isinstance(group, bool) or not isinstance(group, int) or not 0 <= group < count:
        raise ValueError(f"{type(optimizer).__name__} has the parameter groups 0 to {count - 1}, not {group!r}")
    return optimizer.param_groups[group]


def _response(optimizer: Optimizer, options: dict) -> tuple[float, float]:
    """Return sum_k c_k and sum_k c_k^2 of the displacement -lr sum_k c_k g_{t-k}."""
    if isinstance(optimizer, DEAT):
        # c is ((1 + k1) h_t - k1 h_{t-1}) / norm; h_t and h_{t-1} share no gradient
        k1, k2 = options["k1"], options["k2"]
        return 1 / math.hypot(1 + k1, k1), (1 - k2) / (1 + k2)
    momentum, dampening = options["momentum"], options["dampening"]
    if momentum == 0:  # torch ignores dampening then
        return 1.0, 1.0
    if momentum >= 1 or dampening >= 1:
        raise ValueError(f"momentum and dampening must be below 1 to move far, got {momentum} and {dampening}")
    if options["nesterov"]:  # c_0 = 1 + mu, c_k = mu^(k+1)
        return 1 / (1 - momentum), (1 + momentum) ** 2 + momentum**4 / (1 - momentum**2)
    return (1 - dampening) / (1 - momentum), (1 - dampening) ** 2 / (1 - momentum**2)  # c_k = (1 - tau) mu^k


@dataclasses.dataclass(frozen=True, repr=False)
class GradientNoise:
    """Noise of a model's gradients at its present weights.

    Attributes:
        variance: Variance of the gradient of one batch, summed over the weights (the trace of its covariance).
        per_sample: The same for a batch of one, if samples are independent: batch_size * variance.
        signal: Unbiased estimate of the squared norm of the mean gradient; may fall below 0 where noise dominates.
        batch_size: Samples in a batch.
        batches: Number of measured batches.
    """

    variance: float
    per_sample: float
    signal: float
    batch_size: int
    batches: int

    def to_dict(self) -> dict[str, int | float]:
        """Return every attribute by name."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        rows = (("of a batch", self.variance), ("of a sample", self.per_sample), ("squared mean", self.signal))
        head = f"GradientNoise: {self.batches} batches of {self.batch_size}"
        return "\n".join([head, *(f"  {name:<16}{value:>10.4g}" for name, value in rows)])


def gradient_noise(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    attack: Attack | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    batchnorm: str = "train",
    seed: int = 0,
) -> GradientNoise:
    """Measure the variance of a model's batch gradients at its present weights, one pass over ``batches``.

    The model is left unchanged. Memory holds one mean gradient; dropout is off.

    Args:
        model: Classifier of images in [0, 1].
        batches: Images (B, C, H, W) in [0, 1] and labels (B,), at least two batches of one size, drawn at random;
            further items, such as an index, are ignored.
        attack: A torchattacks attack on that model, to measure the gradients of adversarial training.
        loss: Logits (B, K) and labels (B,) to a scalar that averages over the batch.
        batchnorm: Statistics of BatchNorm in the gradients: the batch's own (``"train"``, as in training; the running
            ones are not updated) or the running ones (``"eval"``). Attacks use the running ones.
        seed: Seed of the attack's random starts.

    Raises:
        TypeError: Not a module, not an attack, or batches of the wrong kind.
        ValueError: Fewer than two batches, batches of different sizes, or images or labels out of range.
    """
    params = {n: p.detach() for n, p in check_model(model).named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient")
    if attack is not None:
        check_attack(attack, model)
    stream, device = RandomStream(seed), device_of(model)
    mean = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in params.items()}
    squares = torch.zeros((), dtype=torch.float64, device=device)
    count, size = 0, None
    for images, labels, *_ in batches:
        check_images(images)
        check_labels(labels, size=len(images))
        if size not in (None, len(images)):
            raise ValueError(f"batches must have one size, got {size} and {len(images)}; drop the last one")
        size, count = len(images), count + 1
        images, labels = images.to(device), labels.to(device)
        if attack is not None:
            images = perturb(attack, images, labels, stream=stream)
        with attacking(model, batchnorm):
            leaves = {n: p.requires_grad_() for n, p in ((n, p.detach()) for n, p in params.items())}
            value = loss(functional_call(model, leaves, (images,)), labels)
            gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        with torch.no_grad():  # Welford: the sum of squares about the running mean
            for m, g in zip(mean.values(), gradients):
                if g is not None:
                    away = g - m
                    m.add_(away, alpha=1 / count)
                    squares += (away * (g - m)).sum(dtype=torch.float64)
    if count < 2:
        raise ValueError(f"a variance takes at least two batches, got {count}")
    variance = squares.item() / (count - 1)
    signal = sum(m.square().sum(dtype=torch.float64) for m in mean.values()).item() - variance / count
    return GradientNoise(variance, variance * size, signal, size, count)
