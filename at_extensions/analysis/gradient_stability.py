"""Gradient instability: how much the training gradient changes along a step, and the attack's share of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from at_extensions.checks import check_model, check_name, check_number
from at_extensions.untouched import RandomStream, untouched

DIRECTIONS = ("update", "random")
"""Minus the gradient, or random numbers normalised filter by filter."""


class ZeroGradient(ValueError):
    """The gradient at the given weights is zero, so that its change has no scale."""


class Objective(Protocol):
    """An adversarial loss in two parts, such as any ``at_extensions.methods.Method``."""

    def perturb(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the adversarial examples of a batch."""

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Any:
        """Return the scalar loss, or an object that has it as ``loss``."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Change of the gradient along a direction, one number a step.

    Attributes:
        change: ``|G(s) - G(0)| / |G(0)|``.
        cosine: ``cos(G(s), G(0))``.
        loss: Mean loss at ``theta + s d``.
    """

    change: list[float]
    cosine: list[float]
    loss: list[float]


@dataclasses.dataclass(frozen=True, repr=False)
class GradientInstability:
    """Result of ``gradient_instability``.

    Attributes:
        steps: Lengths s, in units of ``lr``.
        lr: Length of the direction's unit.
        direction: ``"update"``, ``"random"`` or ``"given"``.
        gradient_norm: ``|G(0)|``.
        recomputed: With the attack recomputed at each point.
        frozen: With the adversarial examples of s = 0; None if it was not asked for. The gap between the two curves is
            the attack's share.
        n_images: Number of images.
    """

    steps: list[float]
    lr: float
    direction: str
    gradient_norm: float
    recomputed: Curve
    frozen: Curve | None
    n_images: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> GradientInstability:
        """Return the result that ``to_dict`` turned into plain data."""
        curves = {name: found[name] and Curve(**found[name]) for name in ("recomputed", "frozen")}
        return cls(**{**found, **curves})

    def __repr__(self) -> str:
        head = f"GradientInstability: {self.direction} direction, lr {self.lr:g}, {self.n_images} images"
        columns = f"  {'s / lr':>8}{'change':>10}{'cosine':>10}" + (f"{'frozen':>10}" if self.frozen else "")
        rows = [
            f"  {s:>8.3g}{self.recomputed.change[i]:>10.4f}{self.recomputed.cosine[i]:>10.4f}"
            + (f"{self.frozen.change[i]:>10.4f}" if self.frozen else "")
            for i, s in enumerate(self.steps)
        ]
        return "\n".join([head, columns, *rows])


def gradient_instability(
    model: nn.Module,
    loss: Objective,
    x: Tensor,
    y: Tensor,
    *,
    direction: str | Sequence[Tensor] = "update",
    steps: Sequence[float] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    lr: float = 0.1,
    frozen_attack: bool = True,
    index: Tensor | None = None,
    seed: int = 0,
) -> GradientInstability:
    """Measure how much the training gradient changes along a direction in weight space.

    A *reconstruction* of the gradient instability that Dong et al. (ICLR 2022, arXiv 2106.01606) hold against
    adversarial training on random labels. With G(s) the gradient of the mean loss at theta + s lr d, the attack
    recomputed there from the same random start, it reports

        |G(s) - G(0)| / |G(0)|    and    cos(G(s), G(0)).

    ``frozen_attack`` adds the curve with the adversarial examples kept from s = 0. The gap between both curves is the
    attack's share: a smooth loss whose gradient jumps because the attack moves.

    BatchNorm is in eval mode throughout. Weights, buffers, modes, random streams and the method's memory come back as
    they were, bit for bit.

    Args:
        model: The model whose weights are moved; the one inside ``loss``.
        loss: A training method around the model (``methods.PGDAT``, ...), or any object with its ``perturb`` and
            ``loss``.
        x: Images (B, C, H, W) in [0, 1].
        y: Class numbers (B,).
        direction: ``"update"`` (minus G(0)), ``"random"`` (normalised filter by filter to the weights' norms, biases
            and norm layers left alone, as Li et al. 2018, arXiv 1712.09913), or one tensor for each parameter that
            requires a gradient.
        steps: Lengths s, in units of ``lr``.
        lr: Unit of the step length.
        frozen_attack: Also measure with frozen adversarial examples.
        index: Which training samples these are (B,), for methods that need it.
        seed: Of the attack's random start and of a random direction.

    Raises:
        TypeError: Not a model, or a loss without ``perturb`` and ``loss``.
        ValueError: An unknown direction, tensors of other shapes, no steps, a gradient of zero, or another model inside
            ``loss``.
    """
    check_model(model)
    if not (callable(getattr(loss, "perturb", None)) and callable(getattr(loss, "loss", None))):
        raise TypeError(
            f"loss must be a training method around the model, such as methods.PGDAT, got {type(loss).__name__}"
        )
    if getattr(loss, "model", model) is not model:
        raise ValueError("loss is about another model; make the method around the given one")
    steps = [check_number(f"steps[{i}]", float(s)) for i, s in enumerate(steps)]
    if not steps:
        raise ValueError("steps is empty; give at least one step length")
    check_number("lr", lr, above=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("no parameter of the model requires a gradient")
    name = check_name("direction", direction, DIRECTIONS) if isinstance(direction, str) else "given"
    run = _Run(loss, weights, x, y, index, seed)
    owner = loss if isinstance(loss, nn.Module) else model
    with untouched(owner), untouched(model), _streams_kept(loss), torch.enable_grad():
        start, _ = run.gradient(x_adv := run.attack())
        norm = _norm(start)
        if not (math.isfinite(norm) and norm > 0):
            kind = ZeroGradient if norm == 0 else ValueError
            raise kind(f"the gradient at the given weights has norm {norm:g}, so its change has no scale")
        moves = _direction(direction, weights, start, seed)
        recomputed, frozen = [], []
        for s in steps:
            with _moved(weights, moves, s * lr):
                recomputed.append(run.gradient(run.attack()))
                if frozen_attack:
                    frozen.append(run.gradient(x_adv))
    return GradientInstability(
        steps=steps,
        lr=float(lr),
        direction=name,
        gradient_norm=norm,
        recomputed=_curve(recomputed, start, norm),
        frozen=_curve(frozen, start, norm) if frozen_attack else None,
        n_images=len(x),
    )


class _Run:
    """A batch with its loss; attacks always begin at the same random start and with the same memory of the method."""

    def __init__(self, loss: Objective, weights: list[nn.Parameter], x: Tensor, y: Tensor, index, seed: int):
        self.loss, self.weights, self.x, self.y, self.index, self.seed = loss, weights, x, y, index, seed
        self.memory = copy.deepcopy(loss.memory()) if callable(getattr(loss, "load_memory", None)) else None

    def attack(self) -> Tensor:
        if self.memory is not None:  # temporal ensembling moves its table whenever it attacks
            self.loss.load_memory(self.memory)
        for stream in _streams(self.loss):
            stream.load_state_dict(stream.state_dict() | {"seed": self.seed, "states": {}})
        return self.loss.perturb(self.x, self.y, self.index)

    def gradient(self, x_adv: Tensor) -> tuple[list[Tensor], float]:
        value = self.loss.loss(self.x, x_adv, self.y, self.index)
        value = getattr(value, "loss", value)
        found = torch.autograd.grad(value, self.weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, self.weights)], value.item()


def _direction(
    direction: str | Sequence[Tensor], weights: list[nn.Parameter], start: list[Tensor], seed: int
) -> list[Tensor]:
    if isinstance(direction, str):
        if direction == "update":
            return [-g for g in start]
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w) for w in weights]
        return [_filter_normalised(d, w.detach()) for d, w in zip(drawn, weights)]
    given = list(direction)
    if [tuple(d.shape) for d in given] != [tuple(w.shape) for w in weights]:
        raise ValueError("direction must hold one tensor of the same shape for each parameter that requires a gradient")
    return [d.to(w) for d, w in zip(given, weights)]


def _filter_normalised(direction: Tensor, weight: Tensor) -> Tensor:
    """Return a direction whose filters have the weights' norms; zero for biases and norm layers."""
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    rows, own = direction.flatten(1), weight.flatten(1)
    return (rows * (own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True))).view_as(weight)


@contextlib.contextmanager
def _moved(weights: list[nn.Parameter], moves: list[Tensor], length: float) -> Iterator[None]:
    """Move the weights in place, and put the very same values back."""
    before = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for w, d in zip(weights, moves):
                w.add_(d, alpha=length)
        yield
    finally:
        with torch.no_grad():
            for w, value in zip(weights, before):
                w.copy_(value)


def _streams(loss: object) -> list[RandomStream]:
    """Return every random stream of a method."""
    if callable(getattr(loss, "streams", None)):
        found = loss.streams()
        return list(found.values()) if isinstance(found, dict) else list(found)
    return [loss.stream] if isinstance(getattr(loss, "stream", None), RandomStream) else []


@contextlib.contextmanager
def _streams_kept(loss: object) -> Iterator[None]:
    streams = _streams(loss)
    before = [copy.deepcopy(stream.state_dict()) for stream in streams]
    try:
        yield
    finally:
        for stream, state in zip(streams, before):
            stream.load_state_dict(state)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def _curve(points: Sequence[tuple[list[Tensor], float]], start: list[Tensor], norm: float) -> Curve:
    change, cosine = [], []
    for gradient, _ in points:
        change.append(_norm([g - g0 for g, g0 in zip(gradient, start)]) / norm)
        product = sum((g.double() * g0.double()).sum().item() for g, g0 in zip(gradient, start))
        length = _norm(gradient)
        cosine.append(product / (length * norm) if length else math.nan)
    return Curve(change, cosine, [value for _, value in points])
