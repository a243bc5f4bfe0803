"""The trainer's notice that robust or catastrophic overfitting has set in."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from at_extensions import processes
from at_extensions.analysis import collapse, overfitting


class OverfittingNotice:
    """Writes to standard error, once, that robust or catastrophic overfitting has set in, with the advice.

    Args:
        show: Whether to write at all.
    """

    def __init__(self, *, show: bool):
        self._silent = not show

    def tell(self, rows: Sequence[dict]) -> None:
        """Write the notice if the metrics of the epochs so far (``rows``) call for it for the first time."""
        measured = [row for row in rows if overfitting.KEY in row]
        if self._silent or not processes.is_main() or len(measured) < overfitting.FEWEST_EPOCHS:
            return
        found = collapse.catastrophic_overfitting(measured)  # which has an advice of its own
        lasting = found.onset is not None
        if not lasting:
            found = overfitting.robust_overfitting(measured)
            lasting = found.onset is not None and measured[-1]["epoch"] - found.onset >= 2  # one dip is noise
        if lasting:
            self._silent = True
            tqdm.write(found.advice, file=sys.stderr)
