"""Divergences between two predicted distributions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIVERGENCES = ("cosine", "js", "kl")
"""Cosine and Jensen-Shannon (in bits) lie in [0, 1]; Kullback-Leibler (in nats) is unbounded."""


def divergence(kind: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the divergence of the predictions q from p, shape (B,); exactly 0 where they are equal.

    ``cosine`` is 1 - cos(p, q), computed as |p/|p| - q/|q||^2 / 2, which loses no digits near 0.
    ``js`` is KL(p, m) / 2 + KL(q, m) / 2 in bits with m = (p + q) / 2.
    ``kl`` is KL(p, q) = sum p (log p - log q) in nats.

    Args:
        kind: One of ``DIVERGENCES``.
        log_p: Log probabilities (B, K).
        log_q: Log probabilities (B, K).
    """
    if kind == "kl":
        return _relative_entropy(log_p, log_q)
    p, q = log_p.exp(), log_q.exp()
    if kind == "cosine":
        difference = p / p.norm(dim=1, keepdim=True) - q / q.norm(dim=1, keepdim=True)
        return difference.square().sum(1) / 2
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    both = torch.where(log_p == log_q, log_p, log_m)  # log(2 p) - log(2) is not log(p) to the last bit
    return (_relative_entropy(log_p, both) + _relative_entropy(log_q, both)) / (2 * math.log(2))


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
