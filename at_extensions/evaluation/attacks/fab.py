"""FAB, the fast adaptive boundary attack: AutoAttack's algorithm, with projections that need no sorting in Linf and L2.

Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack", arXiv 1907.02044.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from at_extensions.evaluation.verification import ORDER

_DUAL = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}
_NO_WEIGHT = 1e-8  # weights up to this size move no pixel in L2 and L1, as in AutoAttack
_MOST_STEPS = 100  # of Newton's method, which takes three to six; ends the loop on values that are not finite


class FAB:
    """Search for the nearest adversarial example of each image, by projections onto the linearised decision boundary.

    Every iteration linearises the boundary at the present point (section 3.1), projects the point and the original
    image onto it (equation 5), moves to a combination of both that is biased towards the original (equations 7 to 10),
    and from an adversarial point steps back towards the original (equation 11). As in AutoAttack there is no final
    search (section 3.3). Attributes are AutoAttack's, under its names, and may be changed.

    Args:
        predict: Classifier of images (B, C, H, W) that returns logits (B, K).
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        n_restarts: Runs from the image (the first one) and from random points near it (the others).
        n_iter: Iterations of a run.
        eps: Radius: an adversarial example counts within it, and random starts lie within half of it.
        alpha_max: Largest weight of the original image in the biased step, in [0, 1].
        eta: Overshooting of the projections, at least 1.
        beta: Share of the distance to the original that is left after the backward step, in (0, 1).
        seed: Seeds the global random generators, from which starts are drawn.
        targeted: Whether to aim at one class after the other, which costs one gradient an iteration instead of K.
        n_target_classes: How many classes to aim at, from the second most probable one on.
        device: Where starts are moved to; the images' device if None.
        verbose: AutoAttack's; nothing is printed.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor] | None,
        *,
        norm: str = "Linf",
        n_restarts: int = 1,
        n_iter: int = 100,
        eps: float,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        seed: int | None = 0,
        targeted: bool = False,
        n_target_classes: int = 9,
        device: torch.device | str | None = None,
        verbose: bool = False,
    ):
        self.predict, self.norm, self.eps = predict, norm, eps
        self.n_restarts, self.n_iter = n_restarts, n_iter
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta
        self.seed, self.targeted, self.n_target_classes = seed, targeted, n_target_classes
        self.device, self.verbose = device, verbose

    @torch.no_grad()
    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Return images (B, C, H, W) in which those that FAB fools within ``eps`` are adversarial examples.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            y: Their classes (B,). Images that are misclassified already are not attacked.
        """
        torch.manual_seed(self.seed)
        x_adv = x.clone()
        robust = self.predict(x).argmax(1) == y
        ranks = range(2, self.n_target_classes + 2) if self.targeted else [None]
        for rank in ranks:
            for restart in range(self.n_restarts):
                rows = robust.nonzero().flatten()
                if not len(rows):
                    return x_adv
                nearest = self.attack_single_run(x[rows], y[rows], rank=rank, random_start=restart > 0)
                fooled = (self.predict(nearest).argmax(1) != y[rows]) & (self._size(nearest - x[rows]) <= self.eps)
                x_adv[rows[fooled]] = nearest[fooled]
                robust[rows[fooled]] = False
        return x_adv

    @torch.no_grad()
    def attack_single_run(self, x: Tensor, y: Tensor, *, rank: int | None = None, random_start: bool = False) -> Tensor:
        """Return the nearest adversarial example found for each image (B, C, H, W), or the image itself.

        Args:
            x: Images that are classified as ``y`` (B, C, H, W).
            y: Their classes (B,).
            rank: Aim at the class with the ``rank``-th largest logit; None aims at the nearest boundary.
            random_start: Start from a random point near the image.
        """
        target = None if rank is None else self.predict(x).sort(dim=-1).indices[:, -rank]
        nearest, distance = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        point = self._random_start(x) if random_start else x.clone()
        for _ in range(self.n_iter):
            point = self._biased_step(x, point, *self._boundary(point, y, target))
            fooled = self.predict(point).argmax(1) != y
            size = self._size(point - x)
            closer = fooled & (size < distance)
            nearest = torch.where(_as_images(closer, x), point, nearest)
            distance = torch.where(closer, size, distance)
            point = torch.where(_as_images(fooled, x), x + (point - x) * self.beta, point)
        return nearest

    def _boundary(self, point: Tensor, y: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the nearest linearised boundary <w, z> = b of each point: w (B, D) and b (B,).

        Towards class s it is f_s(x) - f_y(x) + <grad f_s(x) - grad f_y(x), z - x> = 0, at a distance of
        |f_s(x) - f_y(x)| / ||grad f_s(x) - grad f_y(x)||_q from x, with 1/p + 1/q = 1 (equations 6 and 7).
        """
        rows = torch.arange(len(point), device=point.device)
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            logits = self.predict(point)
            if target is not None:
                gap = logits[rows, target] - logits[rows, y]
                (w,) = torch.autograd.grad(gap.sum(), point)
                w, gap = w.flatten(1), gap.detach()
                return w, (w * point.detach().flatten(1)).sum(1) - gap
            classes = range(logits.shape[1])
            gradients = [torch.autograd.grad(logits[:, c].sum(), point, retain_graph=True)[0] for c in classes]
        logits, point = logits.detach(), point.detach()
        gradients = torch.stack(gradients, 1).flatten(2)
        gaps, gradients = logits - logits[rows, y].unsqueeze(1), gradients - gradients[rows, y].unsqueeze(1)
        far = gaps.abs() / (torch.linalg.vector_norm(gradients, ord=_DUAL[self.norm], dim=2) + 1e-12)
        far[rows, y] = torch.inf
        nearest = far.argmin(1)
        w = gradients[rows, nearest]
        return w, (w * point.flatten(1)).sum(1) - gaps[rows, nearest]

    def _biased_step(self, x: Tensor, point: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """Move to a combination of the overshot projections of the point and of the original image (equation 9)."""
        both = torch.cat([point, x]).flatten(1)
        steps = PROJECTIONS[self.norm](both, torch.cat([w, w]), torch.cat([b, b]))
        of_point, of_x = torch.linalg.vector_norm(steps, ord=ORDER[self.norm], dim=1).clamp_min(1e-8).chunk(2)
        alpha = _as_images((of_point / (of_point + of_x)).clamp(0, self.alpha_max), x)
        step, step_of_x = (part.view_as(x) for part in steps.chunk(2))
        return ((point + self.eta * step) * (1 - alpha) + (x + self.eta * step_of_x) * alpha).clamp(0, 1)

    def _random_start(self, x: Tensor) -> Tensor:
        """Return points at half the radius from the images, within [0, 1]; drawn on the CPU, as AutoAttack does."""
        draw = (
            (2 * torch.rand(x.shape, dtype=x.dtype) - 1) if self.norm == "Linf" else torch.randn(x.shape, dtype=x.dtype)
        )
        draw = draw.to(x.device)
        return (x + self.eps * draw / _as_images(self._size(draw), x) * 0.5).clamp(0, 1)

    def _size(self, change: Tensor) -> Tensor:
        return torch.linalg.vector_norm(change.flatten(1), ord=ORDER[self.norm], dim=1)


def _as_images(values: Tensor, x: Tensor) -> Tensor:
    """One number an image (B,), in a shape that broadcasts over images like ``x``."""
    return values.view(-1, *[1] * (x.ndim - 1))


def project_linf(points: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return the smallest steps, in the max norm, that lead points onto hyperplanes within [0, 1] (equation 5).

    Every pixel moves equally far, or as far as the box permits.

    Args:
        points: t (N, D), in [0, 1].
        w: Weights (N, D).
        b: Offsets (N,): the hyperplane is <w, z> = b.

    Returns:
        z - t (N, D); the whole way to the box's corner where the hyperplane does not meet the box.
    """
    return _project(points, w, b, lambda size: 1.0)


def project_l2(points: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return the smallest steps in the Euclidean norm; all else as for ``project_linf``.

    Every pixel moves in proportion to its weight, or as far as the box permits; weights up to 1e-8 count as zero.
    """
    return _project(points, w * (w.abs() > _NO_WEIGHT), b, lambda size: size)


def project_l1(points: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return the smallest steps in the L1 norm; all else as for ``project_linf``.

    Pixels move one after the other, by decreasing weight, each to its face of the box and the last as far as needed.
    Weights up to 1e-8 count as zero.
    """
    w, size, room, to_fall = _descent(points, w * (w.abs() > _NO_WEIGHT), b)
    order = size.argsort(dim=1, descending=True)
    gains = (size * room).gather(1, order)
    left = torch.cat([to_fall, -gains], 1).cumsum(1)[:, :-1]  # when a pixel's turn comes
    way = torch.empty_like(room).scatter_(1, order, left / size.gather(1, order))
    moved = torch.minimum(way.nan_to_num(nan=0.0).clamp_min(0), room)
    return torch.where(w < 0, moved, -moved) * (size > 0)


def _descent(t: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return w signed so that <w, z> has to fall, |w|, how far each pixel can move, and by how much it has to fall."""
    above = (w * t).sum(1, keepdim=True) - b.unsqueeze(1)
    w = torch.where(above < 0, -w, w)
    return w, w.abs(), torch.where(w < 0, 1 - t, t), above.abs()


def _project(t: Tensor, w: Tensor, b: Tensor, pace_of: Callable[[Tensor], Tensor | float]) -> Tensor:
    """Move pixels against their weights, each at its pace, until they are on the plane or at the box's faces.

    The fall of <w, z> is piecewise linear and concave in the time s that they move. A sort of the pixels by their time
    of arrival at the box gives s; Newton's method from s = 0 finds the same s from below, on its very piece, within a
    few passes over the pixels.
    """
    w, size, room, to_fall = _descent(t, w, b)
    pace = pace_of(size)
    fall = size * pace  # in a unit of time, while the pixel moves
    time, slope = torch.zeros_like(to_fall), None
    for _ in range(_MOST_STEPS):
        way = time * pace
        moves = room > way
        before, slope = slope, (fall * moves).sum(1, keepdim=True)
        moved = torch.where(moves, way, room)
        if before is not None and torch.equal(slope, before):
            break
        left = (to_fall - (size * moved).sum(1, keepdim=True)).clamp_min(0)
        time = time + (left / slope).nan_to_num(nan=0.0, posinf=float("inf"))
    return torch.where(w < 0, moved, -moved) * (size > 0)


PROJECTIONS = {"Linf": project_linf, "L2": project_l2, "L1": project_l1}
"""Norm -> projection of points (N, D) onto hyperplanes within [0, 1]."""
