"""Square that asks for the changed square alone: the same attack, as AutoAttack has it, in less time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from at_extensions.evaluation.searching import close, windows_of
from at_extensions.upstream import attack_module

_TOLERANCES = {torch.bfloat16: 0.1, torch.float32: 1e-3, torch.float64: 1e-3}  # of the logits' spread
_FALLEN = 0.1  # share of the images asked for that may have fallen before the others are remembered anew


class _Best:
    """The best images so far, and the model's answers to one square changed in all of them.

    Where ``searching.windows_of`` the model are known, no more of it is computed than the change reaches; the first
    answer for each size of square is compared with the model's own.

    Args:
        predict: Classifier of images (B, C, H, W) that returns logits (B, K).
        x: Images (N, C, H, W), which change with every ``accept``.
    """

    def __init__(self, predict: Callable[[Tensor], Tensor], x: Tensor):
        self.predict, self.x = predict, x
        self._windows = windows_of(predict)
        self._rows, self._size, self._in_windows = torch.arange(0), 0, False
        self._asked: tuple[Any, ...] = ()

    def look(
        self, rows: Tensor, window_of: Callable[[Tensor, tuple], Tensor], top: int, left: int, size: int
    ) -> tuple[Tensor, Tensor]:
        """Change a square in images, for a look.

        Args:
            rows: Those that stand (n,), a subset of those of the look before.
            window_of: Maps images' numbers and the square, as an index of (N, C, H, W), to the changed square.
            top: The square's first row.
            left: Its first column.
            size: Its side.

        Returns:
            Numbers of the images looked at, all of ``rows`` among them, and their logits.
        """
        square = (slice(None), slice(None), slice(top, top + size), slice(left, left + size))
        few = len(rows) < (1 - _FALLEN) * len(self._rows)
        if self._windows is not None and (size != self._size or few):
            self._rows, self._size = rows, size
            self._windows.remember(self.x[rows], size)
            self._in_windows = self._windows.saves
            if self._in_windows:
                window = window_of(rows, square)
                logits, truth = self._windows.look(window, top, left), self._whole(rows, square, window)
                if not close(logits.float(), truth.float(), _TOLERANCES[logits.dtype]):
                    self._windows, self._in_windows = None, False
        if not self._in_windows:
            self._rows = rows
        window = window_of(self._rows, square)
        self._asked = square, window
        if self._in_windows:
            return self._rows, self._windows.look(window, top, left)
        return rows, self._whole(rows, square, window)

    def _whole(self, rows: Tensor, square: tuple, window: Tensor) -> Tensor:
        candidates = self.x[rows]
        candidates[square] = window
        return self.predict(candidates)

    def accept(self, improved: Tensor) -> None:
        """Keep the change in some of the images last looked at (n,)."""
        square, window = self._asked
        places = improved.nonzero().flatten()
        if len(places):
            self.x[square][self._rows[places]] = window[places]  # a view, written by rows
            if self._in_windows:
                self._windows.accept(places)


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """By how much the own class leads (B,)."""
    own = y.unsqueeze(1)
    logits = logits.float()
    return logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -torch.inf).amax(1)


def attack_class() -> type:
    """Return upstream's ``SquareAttack`` with a loop of its own for Linf; upstream itself stays as it is.

    Andriushchenko et al. 2020 (arXiv 1912.00049, algorithms 1 and 2), drawing what upstream draws.
    """
    original = attack_module("square").SquareAttack

    class SquareAttack(original):
        __doc__ = original.__doc__

        @torch.no_grad()
        def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            """Attack images (N, C, H, W); return how often each was asked for, and the best images found."""
            if self.norm != "Linf" or self.targeted or self.loss != "margin":
                return super().attack_single_run(x, y)
            channels, height, width = x.shape[1:]
            start = x + self.eps * self.random_choice([len(x), channels, 1, width])
            best = _Best(self.predict, start.clamp(0.0, 1.0))
            margins = _margin(self.predict(best.x), y)
            queries = torch.ones(len(x), device=x.device)
            for i in range(self.n_queries):
                standing = margins > 0
                rows = standing.nonzero().flatten()
                if not len(rows):
                    break
                side = round(math.sqrt(self.p_selection(i) * (channels * height * width) / channels))  # as upstream
                side = min(max(side, 1), height, width)
                top, left = (int((whole - side) * torch.rand(1)) for whole in (height, width))
                change = 2 * self.eps * self.random_choice([channels, 1, 1])

                def changed(rows: Tensor, square: tuple, change: Tensor = change) -> Tensor:
                    there = x[square][rows]
                    window = torch.maximum(best.x[square][rows] + change, there - self.eps)
                    return torch.minimum(window, there + self.eps).clamp(0.0, 1.0)

                asked, logits = best.look(rows, changed, top, left, side)
                found = _margin(logits, y[asked])
                improved = standing[asked] & ((found < margins[asked]) | (found <= 0))
                margins[asked] = torch.where(improved, found, margins[asked])
                queries[rows] += 1
                best.accept(improved)
            return queries, best.x

    return SquareAttack
