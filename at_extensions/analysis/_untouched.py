"""A context in which a user's model may be run, traced and given other weights, and comes back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_REGISTERS = ("_parameters", "_buffers", "_modules")


def reseed(seed: int) -> None:
    """Seed the global generators that are in use; unlike ``torch.manual_seed``, none that a later call would set up."""
    torch.random.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Give the global random state back as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in eval mode without compilation or gradients, and restore every module's attributes afterwards.

    Restored, also after an exception or Ctrl-C: modes, attributes that a forward pass sets, which tensor each name
    stands for, the values of buffers, and the global random state. Parameters are not copied: nothing writes to them.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    registers = [{key: dict(saved[key]) for key in _REGISTERS} for saved in attributes]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with own_randomness(), torch.no_grad():
            for module in modules:
                module.training = False
                vars(module).pop("_compiled_call_impl", None)  # compiled code knows only the weights it was made with
            yield model
    finally:
        for module, saved, contents in zip(modules, attributes, registers):
            for key, content in contents.items():
                _restore(saved[key], content)
            _restore(vars(module), saved)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _restore(mapping: dict, content: dict) -> None:
    """Make a dict hold ``content`` again; at no moment does it hold less."""
    mapping.update(content)
    for key in mapping.keys() - content.keys():
        del mapping[key]
