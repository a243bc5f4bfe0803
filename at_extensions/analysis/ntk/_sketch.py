"""A count sketch: random signed sums of the entries of gradients, whose inner products are unbiased."""

from __future__ import annotations

import torch
from torch import Tensor


class Fold:
    """Count sketch of rows of p numbers into m sums.

    A random permutation puts every entry into one of m sums, with a random sign. Two entries meet with a probability of
    at most 1 / m, so that sketched inner products have mean g . h and, for |g| = |h| = 1, a variance of at most
    (1 + (g . h)^2) / m.

    Args:
        size: p.
        sums: m.
        seed: Of permutation and signs.
        device: Of the rows.
    """

    def __init__(self, size: int, sums: int, seed: int, device: torch.device):
        generator = torch.Generator().manual_seed(seed)
        padded = -(-size // sums) * sums
        places = torch.randperm(padded, generator=generator)  # the entry of each place; at least p: none
        signs = torch.randint(0, 2, (padded,), generator=generator, dtype=torch.int8) * 2 - 1
        signs[places >= size] = 0
        self._places, self._signs, self._sums = places.clamp_max(size - 1).to(device), signs.to(device), sums

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the sums (B, m) of rows (B, p)."""
        return (rows[:, self._places] * self._signs).view(len(rows), -1, self._sums).sum(1)

    @staticmethod
    def bytes(size: int, sums: int) -> int:
        """Return the bytes of a sketch while it is made."""
        return 18 * (size + sums)
