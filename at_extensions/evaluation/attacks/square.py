"""Square that computes the changed square alone: AutoAttack's attack, with the same results, in less time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from at_extensions.evaluation.attacks.windows import warn_about_windows, windows_of
from at_extensions.evaluation.searching import close
from at_extensions.evaluation.verification import margin
from at_extensions.upstream import attack_module

_TOLERANCES = {torch.bfloat16: 0.1, torch.float32: 1e-3, torch.float64: 1e-3}  # of the logits' spread
_FALLEN = 0.1  # share of the remembered images that may be fooled before the others are remembered anew


class _Best:
    """The best images so far, and the model's logits after one square is changed in all of them.

    Where ``windows.windows_of`` gives windows, no more is computed than the change reaches; the first logits for each
    size of square are compared with the model's own, and if they differ, or computing them fails, windows are given up
    with a ``TwinWarning``.

    Args:
        predict: Classifier of images (B, C, H, W) that returns logits (B, K).
        x: Images (N, C, H, W) that are attacked.
        start: Where to start, within the ball.
        eps: The ball's radius.

    Attributes:
        images: The best images (N, C, H, W).
    """

    def __init__(self, predict: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, eps: float):
        self.predict, self.x, self.images, self.eps = predict, x, start, eps
        self._windows = windows_of(predict)
        self._rows, self._side, self._in_windows = torch.arange(0), 0, False
        self._square, self._window = (), torch.empty(0)

    def look(self, rows: Tensor, change: Tensor, top: int, left: int, side: int) -> tuple[Tensor, Tensor]:
        """Change a square in images, for a look.

        Args:
            rows: The images that are not fooled yet (n,), a subset of those of the look before.
            change: What to add to each channel (C, 1, 1).
            top: The square's first row.
            left: Its first column.
            side: Its side.

        Returns:
            Numbers of the images looked at, all of ``rows`` among them, and their logits.
        """
        self._square = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
        few = len(rows) < (1 - _FALLEN) * len(self._rows)
        if self._windows is not None and (side != self._side or few):
            self._rows, self._side = rows, side
            self._in_windows = self._remember(change, top, left)
        if not self._in_windows:
            self._rows = rows
        self._window = self._changed(change)
        if self._in_windows:
            return self._rows, self._windows.look(self._window, top, left)
        return self._rows, self._whole(self._window)

    def accept(self, improved: Tensor) -> None:
        """Keep the change in some of the images last looked at (n,)."""
        places = improved.nonzero().flatten()
        if len(places):
            self.images[self._square][self._rows[places]] = self._window[places]  # a view, written by rows
            if self._in_windows:
                self._windows.accept(places)

    def _remember(self, change: Tensor, top: int, left: int) -> bool:
        """Remember the images for squares of this side; return whether that saves time, and a look is right."""
        try:
            self._windows.remember(self.images[self._rows], self._side)
            if not self._windows.saves:
                return False
            window = self._changed(change)
            logits, truth = self._windows.look(window, top, left), self._whole(window)
            right = close(logits.float(), truth.float(), _TOLERANCES[logits.dtype])
        except Exception as error:  # a foreign model's layers may raise anything when called one by one
            warn_about_windows(self.predict, f"{type(error).__name__}: {error}")
            self._windows = None
            return False
        if not right:
            warn_about_windows(self.predict, "the logits of a changed window differ from those of the whole image")
            self._windows = None
        return right

    def _changed(self, change: Tensor) -> Tensor:
        """The changed square of each image looked at (n, C, side, side)."""
        x = self.x[self._square][self._rows]
        window = torch.maximum(self.images[self._square][self._rows] + change, x - self.eps)
        return torch.minimum(window, x + self.eps).clamp(0.0, 1.0)

    def _whole(self, window: Tensor) -> Tensor:
        candidates = self.images[self._rows]
        candidates[self._square] = window
        return self.predict(candidates)


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
            start = (x + self.eps * self.random_choice([len(x), channels, 1, width])).clamp(0.0, 1.0)
            margins = margin(self.predict(start).float(), y)
            best = _Best(self.predict, x, start, self.eps)
            queries = torch.ones(len(x), device=x.device)
            for i in range(self.n_queries):
                robust = margins > 0
                rows = robust.nonzero().flatten()
                if not len(rows):
                    break
                side = round(math.sqrt(self.p_selection(i) * (channels * height * width) / channels))  # as upstream
                side = min(max(side, 1), height, width)
                top, left = (int((whole - side) * torch.rand(1)) for whole in (height, width))
                asked, logits = best.look(rows, 2 * self.eps * self.random_choice([channels, 1, 1]), top, left, side)
                found = margin(logits.float(), y[asked])
                improved = robust[asked] & ((found < margins[asked]) | (found <= 0))
                margins[asked] = torch.where(improved, found, margins[asked])
                queries[rows] += 1
                best.accept(improved)
            return queries, best.images

    return SquareAttack
