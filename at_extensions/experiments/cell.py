"""One training run of a study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        arm: Name of the arm.
        seed: Seed of initial weights, order, augmentation and attacks.
        scale: Name of the scale, or None.
        options: All options of ``train`` but the seed and those of the machine.
        first_seed: Whether the seed is the study's first: costly measurements may be limited to it.
    """

    arm: str
    seed: int
    scale: str | None
    options: dict[str, Any]
    first_seed: bool

    @property
    def name(self) -> str:
        """The name of the result file without its suffix."""
        return f"{self.arm}-seed{self.seed}"
