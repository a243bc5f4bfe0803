"""Routes of all layers by their operations, and groups of layers that fit the memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from at_extensions.analysis.ntk._outputs import Outputs
from at_extensions.analysis.ntk._probe import Layer, Probe
from at_extensions.analysis.ntk._rest import Part, Rest
from at_extensions.analysis.ntk._sketch import Fold
from at_extensions.analysis.ntk._units import Pixels, Rows, Unit

_BATCH = 64  # samples of a pass at most: more are no faster
_WORK = 256 * 2**20  # bytes of work space at most: more is no faster
_SCATTERED = 1.5  # memory in use for each byte of short-lived tensors: malloc leaves gaps between them


@dataclass(frozen=True)
class Sizes:
    """The kernel that is asked for.

    Attributes:
        n: Samples of the rows.
        m: Samples of the columns; None for a symmetric kernel.
        itemsize: Bytes of a number in passes.
        work_itemsize: Bytes of a number in products and sums.
        copied: Bytes of the weights' copies in another type.
        weights: Bytes of the largest weight.
    """

    n: int
    m: int | None
    itemsize: int
    work_itemsize: int
    copied: int
    weights: int

    @property
    def samples(self) -> int:
        """Rows and columns that need a pass."""
        return self.n + (self.m or 0)

    @property
    def pairs(self) -> float:
        """Pairs of samples."""
        return self.n * (self.n + 1) / 2 if self.m is None else self.n * self.m

    @property
    def sides(self) -> list[int]:
        """Samples of each side that needs a pass."""
        return [self.n] if self.m is None else [self.n, self.m]


@dataclass(frozen=True)
class Plan:
    """Units in groups, and the sizes of their passes.

    Attributes:
        groups: Units that are kept at the same time; each group costs passes over all samples.
        rest: Ranges of parameters for ``torch.func`` in each group.
        batch: Samples of a pass.
        rest_batch: Samples of a pass by ``torch.func``.
        work: Bytes of work space.
        peak: Bytes in use at most, by estimate.
        least: The least limit that holds one group at a time.
    """

    groups: list[list[Unit]]
    rest: list[Rest | None]
    batch: int
    rest_batch: int
    work: int
    peak: int
    least: int


def units_of(layer: Layer, outputs: Outputs, sizes: Sizes) -> list[Unit]:
    """Return the parts of a layer, its weight's by the route of fewest operations."""
    keys = list(layer.parameters)
    if layer.is_norm or "weight" not in keys:
        return [Rows(layer, keys)]
    costs = route_costs(layer, outputs, sizes)
    route = min(costs, key=costs.get)
    if route == "Gram" and layer.positions == 1:
        return [Pixels(layer, route, with_bias="bias" in keys)]
    small = [Rows(layer, ["bias"])] if "bias" in keys else []
    if route != "J-dot":
        return [Pixels(layer, route), *small]
    formed, kept = Rows(layer, keys), Pixels(layer, route)
    smaller = formed.kept(outputs.passes, 1) <= kept.kept(outputs.passes, 1) + sum(
        u.kept(outputs.passes, 1) for u in small
    )
    return [formed] if smaller or any(w.groups > 1 for w in layer.windows) else [kept, *small]


def route_costs(layer: Layer, outputs: Outputs, sizes: Sizes) -> dict[str, float]:
    """Return multiply-adds of a weight's part by each route that its geometry allows."""
    weight = layer.module.weight
    p, c_out = weight.numel(), len(weight)
    columns, s = p // c_out, layer.positions
    costs = {"J-dot": sizes.pairs * outputs.pairs * p + sizes.samples * outputs.passes * s * p}
    if any(w.groups > 1 for w in layer.windows):
        return costs
    products = s * s * (outputs.pairs * c_out + (1 if outputs.pairing == "merged" else outputs.pairs))
    costs["unfolded Gram"] = sizes.pairs * (s * s * columns + products)
    if len(layer.sides) == 1 and layer.windows[0].dense:
        (c_in, height, width), window = layer.sides[0], layer.windows[0]
        shifts = 0 if window.pointwise else window.kernel[0] + window.kernel[1]
        inner = (height * width) ** 2 * c_in + s * s * shifts
        costs["Gram" if window.pointwise else "pixel Gram"] = sizes.pairs * (inner + products)
        if window.pointwise:
            del costs["unfolded Gram"]
    return costs


def operations(unit: Unit | Rest, outputs: Outputs, sizes: Sizes) -> float:
    """Return the multiply-adds of a unit's contraction, with the forming of single samples' gradients."""
    if isinstance(unit, Pixels):
        return route_costs(unit.layer, outputs, sizes)[unit.route]
    forming = 0.0
    if isinstance(unit, Rows) and "weight" in unit.keys and not unit.layer.is_norm:
        forming = sizes.samples * outputs.passes * unit.layer.positions * unit.layer.module.weight.numel()
    return sizes.pairs * outputs.pairs * unit.size + forming


def make_plan(found: Probe, sizes: Sizes, numels: dict[str, int], limit: int) -> Plan:
    """Return groups of layers whose tensors stay within ``limit`` bytes, with as few passes as that allows.

    Args:
        found: The probe's findings.
        sizes: The kernel that is asked for.
        numels: Entries of each parameter.
        limit: Bytes.

    Raises:
        ValueError: ``limit`` cannot hold one group; the message names the least that can.
    """
    passes, memory = found.outputs.passes, _Memory(found, sizes, numels)
    units = [unit for layer in found.layers for unit in units_of(layer, found.outputs, sizes)]
    kept = [unit.kept(passes, sizes.itemsize) * sizes.samples for unit in units]
    per_entry = passes * sizes.itemsize * sizes.samples
    least_work = max([0, *(unit.least(sizes.samples, passes, sizes.work_itemsize) for unit in units)])
    fixed, largest = _of_kernel(found, sizes), max([0, *kept, per_entry if found.rest else 0])
    least = max(fixed + _reserve(least_work) + memory.of_pass(1) + largest, found.bytes + sizes.copied)
    _check_limit(limit, least, sizes)
    batch, work = _fit(limit - fixed, least_work, largest, memory)
    room = limit - fixed - _reserve(work) - memory.of_pass(batch)
    groups, rest, used = _groups(units, kept, found.rest, numels, per_entry, room)
    peak = max(fixed + _reserve(work) + memory.of_pass(batch) + max(used), found.bytes + sizes.copied)
    return Plan(groups, rest, batch, memory.rest_batch(memory.of_pass(batch)), work, peak, least)


def make_sketch_plan(found: Probe, sizes: Sizes, numels: dict[str, int], sums: int, limit: int) -> Plan:
    """Return the batch and work space of a sketched kernel; it needs one group.

    Raises:
        ValueError: ``limit`` cannot hold the sketches and a pass; the message names the least that can.
    """
    passes, memory = found.outputs.passes, _Memory(found, sizes, numels)
    units = [Rows(layer, [key]) for layer in found.layers for key in layer.parameters]
    folds = [numels[name] for layer in found.layers for name in layer.parameters.values()]
    folds += [numels[name] for name in found.rest]
    largest = max(folds)
    least_work = max([0, *(unit.least(sizes.samples, passes, sizes.work_itemsize) for unit in units)])
    least_work += 4 * passes * sizes.work_itemsize * (largest + sums)
    fixed = _of_kernel(found, sizes) + sizes.samples * passes * sums * sizes.work_itemsize
    fixed += sum(Fold.bytes(numel, sums) for numel in folds)
    least = max(fixed + _reserve(least_work) + memory.of_pass(1), found.bytes + sizes.copied)
    _check_limit(limit, least, sizes)
    batch, work = _fit(limit - fixed, least_work, 0, memory)
    return Plan([], [], batch, memory.rest_batch(memory.of_pass(batch)), work, limit, least)


def _of_kernel(found: Probe, sizes: Sizes) -> int:
    """Return the bytes that are in use from the first group to the last: kernel, copies, reordered weights."""
    entries = sizes.n * (sizes.m or sizes.n)
    blocks = min(found.outputs.pairs * entries, 2**20)  # of the kernel, while they are added or mirrored
    return (found.outputs.pairs * entries + 2 * blocks) * sizes.work_itemsize + sizes.copied + 2 * sizes.weights


def _check_limit(limit: int, least: int, sizes: Sizes) -> None:
    if limit < least:
        raise ValueError(
            f"memory_limit is {limit} bytes; one layer at a time needs at least {least} ({least / 2**20:.0f} MiB) for "
            f"{sizes.samples} inputs"
        )


def _fit(room: int, least_work: int, unit: int, memory: _Memory) -> tuple[int, int]:
    """Return the samples of a pass and the bytes of work space that leave ``unit`` bytes of ``room``."""
    batch, work = _BATCH, max(least_work, min(_WORK, room // 8))
    while batch > 1 and memory.of_pass(batch) > room / 4:
        batch //= 2
    while _reserve(work) + memory.of_pass(batch) + unit > room and (batch, work) != (1, least_work):
        batch, work = max(1, batch // 2), max(least_work, work // 2)
    return batch, work


def _reserve(work: int) -> int:
    """Return the bytes to reserve for a work space."""
    return int(_SCATTERED * work)


class _Memory:
    """Bytes of passes over a batch."""

    def __init__(self, found: Probe, sizes: Sizes, numels: dict[str, int]):
        rest = sum(numels[name] for name in found.rest)
        self._pass = found.graph + found.outputs.passes * found.gradients + 6 * found.largest
        self._func = 3 * found.graph + 6 * found.largest + 3 * rest * sizes.itemsize if found.rest else 0

    def of_pass(self, batch: int) -> int:
        return int(_SCATTERED * max(batch * self._pass, self._func))

    def rest_batch(self, limit: int) -> int:
        return max(1, min(_BATCH, int(limit / _SCATTERED) // max(1, self._func)))


def _groups(
    units: Sequence[Unit], kept: Sequence[int], rest: Sequence[str], numels: dict[str, int], per_entry: int, room: int
) -> tuple[list[list[Unit]], list[Rest | None], list[int]]:
    """Return units in groups of at most ``room`` bytes, ranges of the other parameters that fill them, and bytes."""
    groups: list[list[Unit]] = []
    used: list[int] = []
    for unit, size in zip(units, kept):
        if not groups or used[-1] + size > room:
            groups.append([])
            used.append(0)
        groups[-1].append(unit)
        used[-1] += size
    parts: list[list[Part]] = [[] for _ in groups]
    at = 0
    for name in rest:
        start = 0
        while start < numels[name]:
            if at == len(groups):
                groups.append([])
                used.append(0)
                parts.append([])
            fits = (room - used[at]) // per_entry
            if fits < 1:
                at += 1
                continue
            stop = min(numels[name], start + fits)
            parts[at].append(Part(name, start, stop))
            used[at] += (stop - start) * per_entry
            start = stop
    return groups, [Rest(p) if p else None for p in parts], used or [0]


def gigaflop(multiply_adds: float) -> float:
    """Return operations in units of 10^9, a multiply-add being two."""
    return 2 * multiply_adds / 1e9


def forward_operations(found: Probe) -> float:
    """Return the multiply-adds of the explained layers in a forward pass of one sample."""
    return math.fsum(layer.positions * layer.module.weight.numel() for layer in found.layers if not layer.is_norm)
