"""FAB with faster projections: the same attack, as AutoAttack has it, in less time."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor

from at_extensions.upstream import attack_module

_STEPS = 100  # far more than are ever needed (three to six); a bound for numbers that are none


def projection_linf(points_to_project: Tensor, w_hyperplane: Tensor, b_hyperplane: Tensor) -> Tensor:
    """Return the smallest steps, in the max norm, that lead points onto hyperplanes within [0, 1].

    Croce & Hein 2020 (FAB, arXiv 1907.02044, equation 5): every pixel goes equally far, or as far as the box lets it.

    Args:
        points_to_project: t (N, D), in [0, 1].
        w_hyperplane: w (N, D).
        b_hyperplane: b (N,): the hyperplane is <w, z> = b.

    Returns:
        z - t (N, D); the whole way to the box's corner where the hyperplane does not meet the box.
    """
    return _project(points_to_project, w_hyperplane, b_hyperplane, lambda size: 1.0)


def projection_l2(points_to_project: Tensor, w_hyperplane: Tensor, b_hyperplane: Tensor) -> Tensor:
    """Return the smallest steps in the Euclidean norm; all else as for ``projection_linf``.

    Every pixel goes as far as its weight is large, or as far as the box lets it; as upstream has it, weights up to 1e-8
    are none.
    """
    w = w_hyperplane * (w_hyperplane.abs() > 1e-8)
    return _project(points_to_project, w, b_hyperplane, lambda size: size)


def _project(t: Tensor, w: Tensor, b: Tensor, pace_of: Callable[[Tensor], Tensor | float]) -> Tensor:
    """Move pixels against their weights, each at its pace, until they are on the plane or at the box's faces.

    How far <w, z> falls is piecewise linear and concave in the time s that they move. Upstream sorts the pixels by when
    they arrive at their faces; Newton's method from s = 0 finds the same s from below, on its very piece, within a few
    passes over the pixels.
    """
    above = (w * t).sum(1, keepdim=True) - b.unsqueeze(1)
    w, to_fall = torch.where(above < 0, -w, w), above.abs()
    size, grows = w.abs(), w < 0
    room, pace = torch.where(grows, 1 - t, t), pace_of(size)
    fall = size * pace  # in a unit of time, while the pixel moves
    time, slope = torch.zeros_like(to_fall), None
    for _ in range(_STEPS):
        way = time * pace
        moves = room > way
        before, slope = slope, (fall * moves).sum(1, keepdim=True)
        moved = torch.where(moves, way, room)
        if before is not None and torch.equal(slope, before):
            break
        left = (to_fall - (size * moved).sum(1, keepdim=True)).clamp_min(0)
        time = time + (left / slope).nan_to_num(nan=0.0, posinf=float("inf"))
    return torch.where(grows, moved, -moved) * (size > 0)


def attack_class() -> type:
    """Return upstream's ``FABAttack_PT`` with these projections in place of its own; upstream itself stays as it is."""
    original = attack_module("fab_pt").FABAttack_PT
    run = original.attack_single_run
    projections = {"projection_linf": projection_linf, "projection_l2": projection_l2}
    if not projections.keys() <= run.__globals__.keys():
        return original
    ours = types.FunctionType(
        run.__code__,
        run.__globals__ | projections,
        run.__name__,
        run.__defaults__,
        run.__closure__,
    )
    return type(original.__name__, (original,), {"attack_single_run": ours, "__doc__": original.__doc__})
