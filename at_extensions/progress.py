"""Progress of a loop: a bar on a terminal, plain lines with the time left in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from at_extensions.processes import is_main


def bar(
    iterable: Iterable | None = None,
    text: str = "",
    *,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    show: bool = True,
    leave: bool = True,
    every: float = 0.0,
) -> tqdm | Lines:
    """Return ``iterable`` with its progress shown on standard error: a tqdm bar on a terminal, else ``Lines``.

    Only the main process of a job shows anything. Both kinds offer ``update``, ``set_postfix``, ``set_postfix_str``,
    ``close``, ``total``, iteration and the ``with`` statement.

    Args:
        iterable: The loop's items; None for a bar that ``update`` advances.
        text: Name of the loop, such as ``"epoch"``.
        total: Number of items; the iterable's length if None.
        initial: Items done before.
        unit: Name of one item.
        show: False shows nothing.
        leave: Keep the finished bar, or print a last line.
        every: Seconds between two lines at least; 0 prints a line for each item.
    """
    shown = show and is_main()
    if shown and not (sys.stderr and sys.stderr.isatty()):
        return Lines(iterable, text, total=total, initial=initial, unit=unit, leave=leave, every=every)
    options = {"total": total, "initial": initial, "unit": unit, "leave": leave}
    return tqdm(iterable, desc=text, disable=not shown, dynamic_ncols=True, **options)


class Lines:
    """Progress in whole lines in the place of a tqdm bar, such as ``epoch 3/110  train_loss 1.9  05:12 left``.

    Args: as for ``bar``.
    """

    def __init__(
        self,
        iterable: Iterable | None,
        text: str,
        *,
        total: int | None = None,
        initial: int = 0,
        unit: str = "it",
        leave: bool = True,
        every: float = 0.0,
    ):
        self.iterable, self.text, self.unit, self.leave, self.every = iterable, text, unit, leave, every
        self.n = self.initial = initial
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self._started = self._last = time.perf_counter()
        self._postfix, self._printed = "", (initial, "")

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()

    def update(self, n: int = 1) -> None:
        """Advance by ``n`` items; the last item's line is printed by ``close``."""
        self.n += n
        if self.n != self.total and time.perf_counter() - self._last >= self.every:
            self._print(self._time_left())

    def set_postfix(self, values: Mapping[str, Any]) -> None:
        """Show these values in the next line."""
        self.set_postfix_str("  ".join(f"{key} {value}" for key, value in values.items()))

    def set_postfix_str(self, text: str) -> None:
        """Show this text in the next line."""
        self._postfix = text

    def close(self) -> None:
        """Print the last line, unless it has been printed."""
        if self.leave and self._printed != (self.n, self._postfix):
            self._print(f"{tqdm.format_interval(time.perf_counter() - self._started)} in all")

    def _time_left(self) -> str:
        if self.total is None:
            return ""
        each = (time.perf_counter() - self._started) / (self.n - self.initial)
        return f"{tqdm.format_interval(each * (self.total - self.n))} left"

    def _print(self, times: str) -> None:
        self._last, self._printed = time.perf_counter(), (self.n, self._postfix)
        count = f"{self.n}" if self.total is None else f"{self.n}/{self.total}"
        unit = "" if self.unit == "it" else f" {self.unit}"
        parts = (f"{self.text} {count}{unit}".strip(), self._postfix, times)
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
