"""The cost of an empirical NTK before it is computed: route, operations and bytes of each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from at_extensions.analysis.ntk._outputs import check_outputs
from at_extensions.analysis.ntk._plan import Plan, Sizes, forward_operations, make_plan, operations
from at_extensions.analysis.ntk._probe import Probe, probe
from at_extensions.analysis.ntk._units import Rows
from at_extensions.analysis.ntk.kernel import (
    Predicate,
    check_dtype,
    check_inputs,
    choose_parameters,
    measuring,
    samples_of,
    sizes_of,
)
from at_extensions.checks import check_count, check_model


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of a layer's part of the kernel.

    Attributes:
        name: Of the layer, or of a parameter that ``torch.func`` takes.
        parameters: Number of parameters.
        route: ``"J-dot"`` (gradients of single samples), ``"Gram"``, ``"pixel Gram"``, ``"unfolded Gram"`` (products of
            the inputs' and of the output gradients' Gram matrices) or ``"torch.func"``.
        operations: Floating-point operations of the contraction, a multiply-add being two.
        bytes: Bytes kept for all inputs until then.
    """

    name: str
    parameters: int
    route: str
    operations: float
    bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class NTKCost:
    """Cost of an empirical NTK.

    Attributes:
        layers: Parts in the order of the layers.
        n: Inputs of the rows.
        m: Inputs of the columns; None for a symmetric kernel.
        outputs: As given.
        backward_passes: Backward passes over each batch.
        groups: Groups of layers; each costs a sweep over all inputs.
        batch: Inputs of a pass.
        pass_operations: Floating-point operations of all forward and backward passes; those of attention products and
            elementwise layers are left out.
        bytes: Estimated peak of memory beyond model and inputs.
        least_bytes: The least ``memory_limit``.
    """

    layers: Sequence[LayerCost]
    n: int
    m: int | None
    outputs: int | str
    backward_passes: int
    groups: int
    batch: int
    pass_operations: float
    bytes: int
    least_bytes: int

    @property
    def operations(self) -> float:
        """Floating-point operations of passes and contractions."""
        return self.pass_operations + sum(layer.operations for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it."""
        return dataclasses.asdict(self) | {"operations": self.operations}

    def __repr__(self) -> str:
        size = f"{self.n} x {self.n if self.m is None else self.m}"
        wide = max([5, *(len(layer.name) for layer in self.layers)])
        rows = [
            f"empirical NTK, {size} inputs, outputs {self.outputs!r}: {self.operations / 1e12:.3g} TFLOP, "
            f"{self.bytes / 2**20:,.0f} MiB (at least {self.least_bytes / 2**20:,.0f})",
            f"  {'layer':{wide}}  {'parameters':>11}  {'route':13}  {'GFLOP':>10}  {'MiB':>8}",
        ]
        rows += [
            f"  {layer.name:{wide}}  {layer.parameters:11,}  {layer.route:13}  {layer.operations / 1e9:10,.2f}  "
            f"{layer.bytes / 2**20:8,.1f}"
            for layer in self.layers
        ]
        sweeps = f"{self.groups} x (1 forward, {self.backward_passes} backward)"
        return "\n".join([*rows, f"  {'passes':{wide}}  {sweeps:26}  {self.pass_operations / 1e9:10,.2f}"])


def ntk_cost(
    model: nn.Module,
    x: Tensor | int,
    x2: Tensor | int | None = None,
    *,
    outputs: int | str,
    shape: Sequence[int] | None = None,
    memory_limit: int = 4 * 2**30,
    params: Predicate | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> NTKCost:
    """Return route, operations and bytes of each layer for ``empirical_ntk`` with the same arguments.

    Four inputs at most pass the network, for the shapes of its layers and for the check of their gradients.

    Args:
        model: Network whose outputs are (B, K); left as it was.
        x: Inputs (N, ...), or their number N with ``shape``.
        x2: Inputs of the columns, or their number; None for a symmetric kernel.
        outputs: As for ``empirical_ntk``.
        shape: Shape of one input, such as (3, 32, 32), where ``x`` is a number.
        memory_limit: As for ``empirical_ntk``.
        params: As for ``empirical_ntk``.
        dtype: As for ``empirical_ntk``.

    Raises:
        TypeError: An argument of the wrong kind.
        ValueError: As ``empirical_ntk``, and a number without ``shape``.
    """
    model = getattr(check_model(model), "_orig_mod", model)
    outputs = check_outputs(outputs)
    check_count("memory_limit", memory_limit)
    n, x = _numbered("x", x, shape)
    m, x2 = (None, None) if x2 is None else _numbered("x2", x2, shape)
    check_inputs(x, x2)
    chosen = choose_parameters(model, params)
    with measuring(model, check_dtype(dtype)) as network:
        found = probe(network, network.batch(samples_of(x, x2)), outputs, chosen)
        sizes = sizes_of(network, n, m)
        numels = {name: weight.numel() for name, weight in network.weights.items()}
        plan = make_plan(found, sizes, numels, memory_limit)
    sweeps = len(plan.groups)
    forward = 2 * forward_operations(found) * sizes.samples
    return NTKCost(
        layers=_layers(found, plan, sizes, numels),
        n=n,
        m=m,
        outputs=outputs,
        backward_passes=found.outputs.passes,
        groups=sweeps,
        batch=plan.batch,
        pass_operations=sweeps * forward * (1 + found.outputs.passes) + _rest_passes(found, plan, forward),
        bytes=plan.peak,
        least_bytes=plan.least,
    )


def _numbered(name: str, x: Tensor | int, shape: Sequence[int] | None) -> tuple[int, Tensor]:
    """Return the number of inputs, and a few of them."""
    if isinstance(x, Tensor):
        return (len(x) if x.ndim else 0), x
    number = check_count(name, x)
    if shape is None:
        raise ValueError(f"{name} is a number of inputs, so that shape= is needed, such as (3, 32, 32)")
    return number, torch.rand(min(number, 4), *shape, generator=torch.Generator().manual_seed(0))


def _layers(found: Probe, plan: Plan, sizes: Sizes, numels: dict[str, int]) -> list[LayerCost]:
    passes = found.outputs.passes
    parts: dict[str, list[tuple[str, int, float, int]]] = {}
    for unit in (unit for group in plan.groups for unit in group):
        kept = unit.kept(passes, sizes.itemsize) * sizes.samples
        row = (unit.route, unit.size, operations(unit, found.outputs, sizes), kept)
        weight = not (isinstance(unit, Rows) and unit.keys == ("bias",))
        parts.setdefault(unit.layer.name, []).insert(0 if weight else len(parts.get(unit.layer.name, ())), row)
    rows = [
        LayerCost(name, sum(r[1] for r in of), of[0][0], 2 * sum(r[2] for r in of), sum(r[3] for r in of))
        for name, of in parts.items()
    ]
    for name in found.rest:
        size = numels[name]
        products = 2.0 * sizes.pairs * found.outputs.pairs * size
        rows.append(LayerCost(name, size, "torch.func", products, size * passes * sizes.itemsize * sizes.samples))
    return rows


def _rest_passes(found: Probe, plan: Plan, forward: float) -> float:
    """Return the operations of ``torch.func``'s passes: a forward and a full backward one for each output."""
    return 3 * forward * found.outputs.passes * sum(rest is not None for rest in plan.rest)
