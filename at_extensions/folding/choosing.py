"""Whether attacks search on a folded twin or on the model itself: by the number of steps, or by a measurement."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from numbers import Integral

import torch
from torch import Tensor

from at_extensions.checks import check_name
from at_extensions.folding.twin import FoldedTwin

FEWEST_STEPS = 3
"""From how many gradient steps an attack makes up for bringing a twin up to date (benchmarks/kernels.py)."""

_TIMED = 3  # attacks of each way that are compared, after one of each to warm up
_WAYS = ("twin", "model")


class TwinChoice:
    """The choice between a folded twin and the model itself for each attack.

    ``"auto"`` depends on the attack alone: a twin for three gradient steps or more, since with fewer it can cost more
    to bring up to date than it saves. So the same seed on the same machine gives the same bits.

    ``"measure"`` lets the first eight attacks on images of a shape take turns (twin, model, twin, ...), ignores the
    first of each way, and takes the way with the lower median of seconds from then on. The two ways differ by rounding,
    so two such runs may differ by it too; the seconds are in ``state_dict()``, and a run that is resumed keeps its
    choice. Shapes, dtype, autocast, layout, device and number of steps are told apart. Each of those first attacks ends
    with a synchronisation of the device.

    Args:
        twin: ``"auto"``, ``"measure"``, True (always a twin where there is one) or False (never).

    Raises:
        ValueError: Another value.
    """

    def __init__(self, twin: bool | str = "auto"):
        self.mode = twin if isinstance(twin, bool) else check_name("twin", twin, ("auto", "measure"))
        self._spent: dict[str, dict[str, list[float]]] = {}

    def may_use(self, steps: int) -> bool:
        """Whether attacks of so many gradient steps may search on a twin at all."""
        return self.mode in (True, "measure") or (self.mode == "auto" and steps >= FEWEST_STEPS)

    @contextlib.contextmanager
    def turn(self, x: Tensor, steps: int, fresh_twin: Callable[[], FoldedTwin | None]) -> Iterator[FoldedTwin | None]:
        """Give one attack the twin, or None for the model itself, and time it if that is still to be measured.

        Args:
            x: Images (B, C, H, W).
            steps: Gradient steps of the attack.
            fresh_twin: Brings the twin up to date and returns it, or None where there is none.
        """
        if self.mode != "measure":
            yield fresh_twin() if self.may_use(steps) else None
            return
        key = _key(x, steps)
        spent = self._spent.get(key) or {way: [] for way in _WAYS}
        chosen = _chosen(spent)
        if chosen is not None:
            yield fresh_twin() if chosen == "twin" else None
            return
        way = _WAYS[sum(map(len, spent.values())) % 2]
        start = _now(x.device)
        twin = fresh_twin() if way == "twin" else None
        yield twin
        if twin is not None or way == "model":  # else there is nothing to choose
            spent[way].append(_now(x.device) - start)
            self._spent[key] = spent

    def chosen(self) -> dict[str, str]:
        """Return ``"twin"`` or ``"model"`` for each kind of attack that has been measured."""
        found = {key: _chosen(spent) for key, spent in self._spent.items()}
        return {key: way for key, way in found.items() if way is not None}

    def state_dict(self) -> dict:
        """Return the seconds that were measured, by kind of attack and way; empty unless ``"measure"``."""
        return {key: {way: list(times) for way, times in spent.items()} for key, spent in self._spent.items()}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the measurements of another choice."""
        self._spent = {key: {way: list(spent[way]) for way in _WAYS} for key, spent in state.items()}


def count_steps(attack: object) -> int:
    """Return an attack's gradient steps, ``attack.steps`` in torchattacks; 1 if it has no such number."""
    steps = getattr(attack, "steps", 1)
    return int(steps) if isinstance(steps, Integral) and not isinstance(steps, bool) else 1


def _chosen(spent: dict[str, list[float]]) -> str | None:
    """Return the faster way, or None until both have been timed."""
    if min(len(times) for times in spent.values()) <= _TIMED:
        return None
    return min(reversed(_WAYS), key=lambda way: statistics.median(spent[way][1:]))


def _key(x: Tensor, steps: int) -> str:
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    layout = "channels_last" if not x.is_contiguous() else "contiguous"
    return f"{tuple(x.shape)} {x.dtype} autocast={autocast} {layout} {kind} steps={steps}"


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()
