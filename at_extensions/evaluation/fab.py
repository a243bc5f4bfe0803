"""FAB with a faster projection: the same attack, as AutoAttack has it, in less time."""

from __future__ import annotations

import types

import torch
from torch import Tensor

from at_extensions.upstream import attack_module

_STEPS = 100  # far more than are ever needed (three to six); a bound for numbers that are none


def projection_linf(points_to_project: Tensor, w_hyperplane: Tensor, b_hyperplane: Tensor) -> Tensor:
    """Return the smallest steps, in the max norm, that lead points onto hyperplanes within [0, 1].

    Croce & Hein 2020 (FAB, arXiv 1907.02044, equation 5). A step of size s moves every pixel by s against its weight,
    or as far as the box lets it; how far <w, z> falls is piecewise linear and concave in s. Upstream sorts the pixels
    by the room they have; Newton's method from s = 0 finds the same s from below, on its very piece, within a few
    passes over the pixels.

    Args:
        points_to_project: t (N, D), in [0, 1].
        w_hyperplane: w (N, D).
        b_hyperplane: b (N,): the hyperplane is <w, z> = b.

    Returns:
        z - t (N, D); the whole way to the box's corner where the hyperplane does not meet the box.
    """
    t, w = points_to_project, w_hyperplane
    above = (w * t).sum(1, keepdim=True) - b_hyperplane.unsqueeze(1)
    w, to_fall = torch.where(above < 0, -w, w), above.abs()
    size, grows = w.abs(), w < 0
    room = torch.where(grows, 1 - t, t)
    step, slope = torch.zeros_like(to_fall), None
    for _ in range(_STEPS):
        before, slope = slope, (size * (room > step)).sum(1, keepdim=True)
        moved = torch.minimum(room, step)
        if before is not None and torch.equal(slope, before):
            break
        left = (to_fall - (size * moved).sum(1, keepdim=True)).clamp_min(0)
        step = step + (left / slope).nan_to_num(nan=0.0, posinf=float("inf"))
    return torch.where(grows, moved, -moved) * (size > 0)


def attack_class() -> type:
    """Return upstream's ``FABAttack_PT`` with this projection in place of its own; upstream itself stays as it is."""
    original = attack_module("fab_pt").FABAttack_PT
    run = original.attack_single_run
    if "projection_linf" not in run.__globals__:
        return original
    ours = types.FunctionType(
        run.__code__,
        run.__globals__ | {"projection_linf": projection_linf},
        run.__name__,
        run.__defaults__,
        run.__closure__,
    )
    return type(original.__name__, (original,), {"attack_single_run": ours, "__doc__": original.__doc__})
