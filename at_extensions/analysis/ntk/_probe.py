"""One pass on a few samples: layers whose gradients follow from inputs and outputs, and the memory of a pass."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from at_extensions.analysis.ntk._layers import (
    KINDS,
    NORMS,
    Window,
    norm_rows,
    output_gradient,
    pixels,
    unfold,
    weight_gradient,
)
from at_extensions.analysis.ntk._outputs import Outputs, resolve_outputs
from at_extensions.analysis.ntk._passes import Call, Network, gradients

SAMPLES = 4
"""Samples of the check; weighted differently, so that rows which belong to another sample are noticed."""

_NOISE = 64  # roundings of a sum of terms, in units of the largest that cancel in it
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A module whose parameters' gradients follow from its inputs and the gradients of its outputs.

    Attributes:
        name: Of the module.
        module: The module.
        parameters: ``"weight"`` and ``"bias"``, those that are chosen and explained, to the parameter's name.
        sides: (c_in, H, W) of the input of each call, as ``pixels`` returns it; empty for a normalisation.
        windows: Geometry of each call.
        positions: S, output pixels or tokens of all calls.
    """

    name: str
    module: nn.Module
    parameters: Mapping[str, str]
    sides: tuple[tuple[int, int, int], ...] = ()
    windows: tuple[Window, ...] = ()
    positions: int = 0

    @property
    def is_norm(self) -> bool:
        """Whether it is a normalisation, whose parameters' gradients are as small as its channels."""
        return isinstance(self.module, NORMS)


@dataclass(frozen=True)
class Probe:
    """Findings of the pass.

    Attributes:
        outputs: The backward passes.
        layers: Explained layers in the order of their first calls.
        rest: Names of the other chosen parameters that the outputs depend on.
        signature: Calls of each layer, with the sizes of input and output for each sample.
        graph: Bytes that autograd saves for each sample.
        gradients: Bytes of all layers' output gradients for each sample.
        largest: Bytes of the largest input or output of a layer for each sample.
        bytes: Estimated peak of the pass itself.
    """

    outputs: Outputs
    layers: Sequence[Layer]
    rest: Sequence[str]
    signature: Mapping[str, tuple]
    graph: int
    gradients: int
    largest: int
    bytes: int


def candidates(model: nn.Module, chosen: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules of supported kinds that hold one of the chosen parameters, and share none with another."""
    first = {id(p): name for name, p in model.named_parameters()}
    owners: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(first[id(parameter)], []).append(name)
    own = {name: names[0] for name, names in owners.items() if len(names) == 1 and name in set(chosen)}
    holding = set(own.values())
    return {n: m for n, m in model.named_modules() if n in holding and isinstance(m, KINDS)}


def probe(network: Network, samples: Tensor, outputs: int | str, chosen: Sequence[str]) -> Probe:
    """Compare, parameter by parameter, captured gradients with ordinary ones.

    With random weights v over samples and u over outputs, sum_i v_i J_i, formed layer by layer from one backward pass
    of u . f, must be the gradient of sum_i v_i u . f(x_i). A parameter for which it is not is left to ``torch.func``.

    Args:
        network: The network in eval mode.
        samples: A few images (n, ...), as ``network.batch`` returns them.
        outputs: As the user chose them.
        chosen: Names of the parameters.

    Raises:
        TypeError: The outputs are not a tensor.
        ValueError: The outputs are not (B, K), have no such class, are not finite, depend on other images, or on no
            chosen parameter.
    """
    n, modules = len(samples), candidates(network.model, chosen)
    alone, calls_alone = network.record(samples[:1], modules)
    found = resolve_outputs(outputs, alone.detach() if isinstance(alone, Tensor) else alone)
    leaves = {name: network.weights[name].detach().requires_grad_() for name in chosen}
    saved = _Saved(network.weights.values())
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        logits, calls = network.record(samples, modules, leaves)
    _check_independent(logits.detach(), alone.detach(), n)
    ordinary, captured = _both(logits, calls, leaves, found)
    own = {id(p): name for name, p in network.model.named_parameters()}
    layers, explained = [], set()
    for name in _with_samples_first(calls, calls_alone, n):
        names = {k: own[id(p)] for k, p in modules[name]._parameters.items() if p is not None}
        ours = [(call, d) for call, d in zip(calls, captured) if call.layer == name]
        sums = _weighted_sums(modules[name], ours, n)
        names = {k: p for k, p in names.items() if p in leaves and k in sums and _agree(ordinary[p], *sums[k])}
        if names:
            layers.append(_layer(name, modules[name], names, [call for call, _ in ours], n))
            explained |= set(names.values())
    rest = [name for name in chosen if name not in explained and ordinary[name] is not None]
    if not layers and not rest:
        raise ValueError("the model's outputs depend on no chosen parameter")
    if rest:
        log.info("gradients by torch.func for %s", ", ".join(rest))
    of_chosen = [leaf.nbytes for leaf in leaves.values()]
    sizes = [max(call.x.nbytes, call.shape.numel() * call.x.itemsize) for call in calls]
    outputs_bytes = sum(call.shape.numel() * call.x.itemsize for call in calls)
    largest = max([samples.nbytes, *sizes])
    return Probe(
        outputs=found,
        layers=layers,
        rest=rest,
        signature=signature(calls, n),
        graph=-(-saved.bytes // n),
        gradients=-(-outputs_bytes // n),
        largest=-(-largest // n),
        bytes=sum(of_chosen) + 7 * max(of_chosen) + saved.bytes + 2 * outputs_bytes + 6 * largest,
    )


def _with_samples_first(calls: Sequence[Call], alone: Sequence[Call], n: int) -> list[str]:
    """Return the layers whose inputs' leading dimension grows with the batch, as in those of one sample alone."""
    names = list(dict.fromkeys(call.layer for call in calls))
    shapes = {
        name: [(n * c.x.shape[0], *c.x.shape[1:]) for c in alone if c.layer == name and c.x.ndim] for name in names
    }
    return [name for name in names if shapes[name] == [tuple(c.x.shape) for c in calls if c.layer == name]]


def signature(calls: Sequence[Call], batch: int) -> dict[str, tuple]:
    """Return the calls of each layer, with the sizes of input and output for each sample."""
    found: dict[str, tuple] = {}
    for call in calls:
        sizes = (call.x.numel() / batch, call.shape.numel() / batch)
        found[call.layer] = (*found.get(call.layer, ()), sizes)
    return found


class _Saved:
    """Bytes of the tensors that autograd saves, each storage once, weights not."""

    def __init__(self, weights):
        self._seen = {w.untyped_storage().data_ptr() for w in weights}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


def _check_independent(logits: Tensor, alone: Tensor, n: int) -> None:
    if logits.shape != (n, alone.shape[1]):
        raise ValueError(f"the model must return outputs (B, K); for {n} images it returned {tuple(logits.shape)}")
    if not (logits.isfinite().all() and alone.isfinite().all()):
        raise ValueError(f"the model's outputs are not finite (dtype {logits.dtype})")
    moved, scale = (logits[:1] - alone).abs().max(), logits.abs().max()
    if moved > torch.finfo(logits.dtype).eps ** 0.5 * scale:
        raise ValueError(
            "an image's outputs depend on the other images of its batch, or on chance; a kernel needs a function of "
            "one image (BatchNorm with running statistics, no sampling in eval mode)"
        )


def _both(
    logits: Tensor, calls: Sequence[Call], leaves: Mapping[str, Tensor], outputs: Outputs
) -> tuple[dict[str, Tensor | None], list[Tensor]]:
    """Return ordinary gradients with weighted samples, and output gradients without the samples' weights."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(outputs.passes, generator=generator).to(logits) @ outputs.cotangents
    v = _sample_weights(len(logits)).to(logits)
    if not logits.requires_grad:
        return dict.fromkeys(leaves), [call.x.new_zeros(call.shape) for call in calls]
    with torch.enable_grad():
        total = (logits * u * v.unsqueeze(1)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
    return dict(zip(leaves, found)), gradients(logits, u, calls, keep=False)


def _sample_weights(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1))


def _weighted_sums(module: nn.Module, calls: Sequence[tuple[Call, Tensor]], n: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return sum_i v_i J_i of weight and bias from captures, and the same with every term's absolute value.

    Empty where the layout of input or output is not one that the layer's formula knows.
    """
    totals: list[dict[str, Tensor]] = [{}, {}]
    for call, d in calls:
        v = _sample_weights(n).to(d)
        for total, weights, absolute in zip(totals, (v, v.abs()), (False, True)):
            parts = _call_sums(module, call, d, weights, absolute)
            if parts is None:
                return {}
            for key, part in parts.items():
                total[key] = total[key].add_(part) if key in total else part
    return {key: (part, totals[1][key]) for key, part in totals[0].items()}


def _call_sums(module: nn.Module, call: Call, d: Tensor, weights: Tensor, absolute: bool) -> dict[str, Tensor] | None:
    n = len(weights)
    if isinstance(module, NORMS):
        rows = norm_rows(module, call, d, n, absolute=absolute)
        return None if rows is None else {key: weights @ part for key, part in rows.items()}
    shaped = pixels(module, call, n)
    if shaped is None or call.shape.numel() % n:
        return None
    (x, window), d = shaped, output_gradient(module, d, n)
    if d.shape[2] != window.side(x.shape[2], 0) * window.side(x.shape[3], 1):
        return None
    x, d = (x.abs(), d.abs()) if absolute else (x, d)
    weight = sum(
        v * weight_gradient(unfold(x[i : i + 1], window), d[i : i + 1].unsqueeze(1))[0, 0]
        for i, v in enumerate(weights)
    )
    return {"weight": weight, "bias": weights @ d.sum(2)}


def _agree(ordinary: Tensor | None, captured: Tensor, size: Tensor) -> bool:
    """Whether a captured gradient is the ordinary one, up to the rounding of sums."""
    if ordinary is None:
        return False
    if ordinary.numel() != captured.numel():
        return False
    eps, norm = torch.finfo(captured.dtype).eps, functools.partial(torch.linalg.vector_norm, dtype=torch.float64)
    difference = norm(ordinary.flatten() - captured.flatten())
    return bool(difference <= eps**0.5 * norm(ordinary) + _NOISE * eps * norm(size))


def _layer(name: str, module: nn.Module, names: dict[str, str], calls: Sequence[Call], n: int) -> Layer:
    if isinstance(module, NORMS):
        return Layer(name, module, names)
    inputs, windows = zip(*(pixels(module, call, n) for call in calls))
    positions = sum(w.side(x.shape[2], 0) * w.side(x.shape[3], 1) for x, w in zip(inputs, windows))
    return Layer(name, module, names, tuple(tuple(x.shape[1:]) for x in inputs), windows, positions)
