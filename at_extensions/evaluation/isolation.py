"""The surroundings that an evaluation runs in, put back afterwards: random state, gradients, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Run without autograd, autocast and inference mode; every global random generator comes back as it was."""
    with (
        random_state_kept(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


@contextlib.contextmanager
def frozen(model: object) -> Iterator[None]:
    """Let no parameter of a module need a gradient; anything else that can be called is left alone."""
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put every global random generator of torch back as it was."""
    # torch.manual_seed, which AutoAttack calls, seeds the CPU and every device at once
    seed, cpu = torch.initial_seed(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_available():  # not in use yet: the seed that it will start from
            torch.cuda.manual_seed_all(seed)
