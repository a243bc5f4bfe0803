"""The tensors of a layer, and the tensors that a reset replaces them by."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from at_extensions.checks import check_name, unknown_name
from at_extensions.untouched import random_state_kept, reseed

RESETS = ("random", "norm_matched", "permute", "zero")
"""Kinds of reset; a state dict to rewind to is accepted as well."""

_REPEATED = ("random", "norm_matched", "permute")  # random: they differ from trial to trial

Predicate = Callable[[str, nn.Module], bool]


class Layer(NamedTuple):
    """A layer, or several tied ones, that is reset as a whole.

    Attributes:
        name: As in ``model.named_modules()``.
        tied: Names of other layers that share a tensor, or its memory, with it; they are reset with it.
        tensors: Names of its parameters and floating-point buffers, as in ``unique_tensors``.
        parameters: The names among ``tensors`` that are parameters.
    """

    name: str
    tied: tuple[str, ...]
    tensors: tuple[str, ...]
    parameters: frozenset[str]


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters (detached) and buffers by name, each shared tensor under its first name alone."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return tensors | dict(model.named_buffers())


def choose_layers(model: nn.Module, layers: Predicate | Sequence[str] | None) -> list[Layer]:
    """Return the layers to reset.

    Args:
        model: The network.
        layers: None for every Conv2d and Linear, a predicate ``(name, module) -> bool``, or names.

    Raises:
        ValueError: A name that does not exist, a layer without weights, or none chosen.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if layers is None:
        names = [n for n, m in modules.items() if isinstance(m, (nn.Conv2d, nn.Linear))]
    elif callable(layers):
        names = [n for n, m in modules.items() if n and _floating(m) and layers(n, m)]
    else:
        names = list(dict.fromkeys([layers] if isinstance(layers, str) else layers))
        _check_named(names, modules)
    if not names:
        raise ValueError(
            f"no layers to reset in {type(model).__name__}; by default these are its Conv2d and Linear modules: "
            "pass layers=, names or a predicate (name, module) -> bool"
        )
    return [_layer(model, group, modules) for group in _tied_groups(names, modules)]


def _check_named(names: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    for name in names:
        if not name or name not in modules:
            raise unknown_name("layer", name, [n for n in modules if n])
        if not _floating(modules[name]):
            raise ValueError(f"layer {name!r} ({type(modules[name]).__name__}) has no weights to reset")


def _floating(module: nn.Module) -> list[Tensor]:
    return [t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]


def _tied_groups(names: Sequence[str], modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Group layers that share tensors, ordered by each group's first layer; nested layers do not count as tied."""
    places = {name: {(t.data_ptr(), t.shape) for t in _floating(modules[name]) if t.numel()} for name in names}
    groups: list[list[str]] = []
    for name in names:
        tied = [g for g in groups if any(places[name] & places[other] and not _nested(name, other) for other in g)]
        merged = [member for group in tied for member in group] + [name]
        if tied:
            groups[groups.index(tied[0])] = merged
            groups = [group for group in groups if group not in tied]
        else:
            groups.append(merged)
    return groups


def _nested(a: str, b: str) -> bool:
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _layer(model: nn.Module, group: Sequence[str], modules: Mapping[str, nn.Module]) -> Layer:
    first_name = {id(p): n for n, p in model.named_parameters()} | {id(b): n for n, b in model.named_buffers()}
    tensors = dict.fromkeys(first_name[id(t)] for name in group for t in _floating(modules[name]))
    parameters = frozenset(first_name[id(p)] for name in group for p in modules[name].parameters())
    return Layer(group[0], tuple(group[1:]), tuple(tensors), parameters)


class Resets:
    """The replacement tensors of each layer in each trial.

    Args:
        kind: One of ``RESETS``, or a state dict to rewind to.
        fresh: ``seed -> module``, an untrained network of the same architecture.
        seed: Trial t uses ``seed + t``.
        state: The trained tensors, by name.
        layers: The layers to reset.

    Attributes:
        name: The kind of reset, as results name it.
        repeated: Whether the reset is random, so that trials differ.

    Raises:
        TypeError: ``fresh`` is no function.
        ValueError: An unknown kind, or a state dict that lacks tensors of a layer.
    """

    def __init__(
        self,
        kind: str | Mapping[str, Tensor],
        fresh: Callable[[int], nn.Module],
        seed: int,
        state: Mapping[str, Tensor],
        layers: Sequence[Layer],
    ):
        self.name = "state dict" if isinstance(kind, Mapping) else check_name("reset", kind, RESETS)
        self.repeated = self.name in _REPEATED
        if isinstance(fresh, nn.Module) or not callable(fresh):
            raise TypeError("fresh must be a function seed -> module, such as lambda seed: Net()")
        self._kind, self._fresh, self._seed, self._state = kind, fresh, seed, state
        if isinstance(kind, Mapping):
            _check_tensors("reset, the state dict to rewind to,", kind, state, layers)

    def trial(self, trial: int, layers: Sequence[Layer]) -> list[dict[str, Tensor]]:
        """Return the new tensors of each of ``layers``, by name, in trial number ``trial`` from 0.

        Raises:
            TypeError: ``fresh`` returned no module.
            ValueError: It returned another architecture.
        """
        source = self._kind
        if self.name in ("random", "norm_matched"):
            source = self._fresh_tensors(self._seed + trial, layers)
        return [{name: self._tensor(name, layer, trial, source) for name in layer.tensors} for layer in layers]

    def bytes_of(self, layer: Layer) -> int:
        """Return the bytes that one reset of ``layer`` takes."""
        return sum(self._state[name].numel() * self._state[name].element_size() for name in layer.tensors)

    def _fresh_tensors(self, seed: int, layers: Sequence[Layer]) -> dict[str, Tensor]:
        with random_state_kept():
            reseed(seed)
            network = self._fresh(seed)
        if not isinstance(network, nn.Module):
            raise TypeError(f"fresh(seed) must return a torch.nn.Module, got {type(network).__name__}")
        tensors = dict(network.named_parameters(remove_duplicate=False))
        tensors |= dict(network.named_buffers(remove_duplicate=False))
        _check_tensors(f"fresh({seed}), a {type(network).__name__},", tensors, self._state, layers)
        names = [name for layer in layers for name in layer.tensors]
        if all(torch.equal(tensors[name].to(self._state[name]), self._state[name]) for name in names):
            warnings.warn(f"fresh({seed}) has the model's own weights, so nothing will move", stacklevel=6)
        return tensors

    def _tensor(self, name: str, layer: Layer, trial: int, source: Mapping[str, Tensor]) -> Tensor:
        trained = self._state[name]
        if isinstance(self._kind, Mapping) or self.name == "random":
            return _laid_out_like(trained, source[name])
        if name not in layer.parameters:
            return trained  # a variance that was zeroed, permuted or rescaled would be no control of anything
        if self.name == "zero":
            return torch.zeros_like(trained)
        if self.name == "permute":
            order = torch.randperm(trained.numel(), generator=_generator(self._seed + trial, name))
            return _laid_out_like(trained, trained.flatten()[order.to(trained.device)].view_as(trained))
        drawn = _laid_out_like(trained, source[name])
        norm = drawn.norm()
        return drawn * torch.where(norm > 0, trained.norm() / norm, torch.zeros_like(norm))


def _laid_out_like(trained: Tensor, values: Tensor) -> Tensor:
    """Return a copy of ``values`` with the device, dtype and memory format of ``trained``."""
    return torch.empty_like(trained).copy_(values.detach())


def _generator(seed: int, name: str) -> torch.Generator:
    """Return a generator for one tensor, so that its draws do not depend on the choice of layers."""
    state = np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def _check_tensors(
    source: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], layers: Sequence[Layer]
) -> None:
    wanted = [name for layer in layers for name in layer.tensors]
    missing = [name for name in wanted if name not in tensors]
    other = [name for name in wanted if name in tensors and tensors[name].shape != state[name].shape]
    if missing:
        there = next(iter(tensors), "nothing")
        raise ValueError(
            f"{source} lacks {len(missing)} of the model's tensors ({missing[0]!r}, ...; its first is {there!r}); it "
            "must be of the same architecture, wrapped in the same way"
        )
    if other:
        shapes = f"{tuple(tensors[other[0]].shape)} instead of {tuple(state[other[0]].shape)}"
        raise ValueError(f"{source} has {len(other)} tensors of another shape ({other[0]!r}: {shapes}, ...)")
