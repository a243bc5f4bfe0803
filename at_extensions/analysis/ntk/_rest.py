"""Gradients of single samples by torch.func, for parameters that no layer's input and output explain."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from at_extensions.analysis.ntk._accumulator import Accumulator
from at_extensions.analysis.ntk._passes import Network

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A range of the entries of one parameter."""

    name: str
    start: int
    stop: int


class Rest:
    """Gradients of single samples for ranges of parameters, (N, A, p): K += J J^T.

    Args:
        parts: The ranges.
    """

    route = "torch.func"

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.size = sum(part.stop - part.start for part in parts)
        self._kept: list[Tensor] = []

    def allocate(self, counts: Sequence[int], passes: int, like: Tensor) -> None:
        """Make room for the samples of both sides."""
        self._kept = [like.new_empty(n, passes, self.size) for n in counts]

    def take(self, side: int, samples: slice, a: int, rows: Mapping[str, Tensor]) -> None:
        """Keep the part of a batch in backward pass ``a``."""
        found = [rows[part.name][:, part.start : part.stop] for part in self.parts]
        self._kept[side][samples, a] = torch.cat(found, 1)

    def contract(self, total: Accumulator, limit: int) -> None:
        """Add this part to the kernel, and discard it."""
        total.add_rows(self._kept[0], self._kept[-1])
        self._kept = []


def sample_gradients(network: Network, x: Tensor, names: Sequence[str], cotangent: Tensor) -> dict[str, Tensor]:
    """Return the gradients (B, p) of ``cotangent . f`` for each sample of a batch.

    Models that ``torch.func.vmap`` does not take (custom autograd functions, for example) run sample by sample.

    Args:
        network: The network.
        x: Batch (B, ...).
        names: The parameters.
        cotangent: (K,).
    """
    weights = {name: network.weights[name] for name in names}

    def of_sample(weights: Mapping[str, Tensor], sample: Tensor) -> Tensor:
        return (network(sample.unsqueeze(0), weights) * cotangent).sum()

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
        try:
            found = torch.func.vmap(torch.func.grad(of_sample), in_dims=(None, 0))(weights, x.clone())
        except (RuntimeError, NotImplementedError) as error:
            log.info("sample by sample, since vmap fails: %s", error)
            found = _one_by_one(network, x, weights, cotangent)
    return {name: rows.detach().flatten(1) for name, rows in found.items()}


def _one_by_one(network: Network, x: Tensor, weights: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for sample in x.split(1):
        total = (network(sample.clone(), leaves) * cotangent).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), found):
            rows[name].append(torch.zeros_like(leaf) if gradient is None else gradient)
    return {name: torch.stack(of_name) for name, of_name in rows.items()}
