"""Passes over all inputs, and the contraction of the tensors that they leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from at_extensions.analysis.ntk._accumulator import Accumulator
from at_extensions.analysis.ntk._passes import Network, gradients
from at_extensions.analysis.ntk._plan import Plan
from at_extensions.analysis.ntk._probe import Layer, Probe, signature
from at_extensions.analysis.ntk._rest import Rest, sample_gradients
from at_extensions.analysis.ntk._sketch import Fold
from at_extensions.analysis.ntk._units import Captured, Rows, Unit
from at_extensions.progress import bar


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of products and sums for passes in ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class Run:
    """One kernel in the making.

    Args:
        network: The network in eval mode.
        found: The findings of its probe.
        inputs: The inputs of rows, and of columns where they are others.
        progress: Show progress.
    """

    def __init__(self, network: Network, found: Probe, inputs: Sequence[Tensor], progress: bool):
        self._network, self._found, self._inputs, self._progress = network, found, inputs, progress
        self._counts = [len(x) for x in inputs]
        self._like = torch.empty(0, dtype=network.dtype, device=network.device)

    def _total(self) -> Accumulator:
        m = self._counts[1] if len(self._counts) > 1 else None
        return Accumulator(self._found.outputs, self._counts[0], m, work_dtype(self._like.dtype), self._like.device)

    def exact(self, plan: Plan) -> Tensor:
        """Return the kernel, group by group."""
        total, steps = self._total(), 0
        for units, rest in zip(plan.groups, plan.rest):
            steps += self._number(plan.batch) * bool(units) + self._number(plan.rest_batch) * bool(rest)
        with bar(text="ntk", unit="batches", total=steps, show=self._progress, every=60) as shown:
            for units, rest in zip(plan.groups, plan.rest):
                for unit in [*units, *([rest] if rest else [])]:
                    unit.allocate(self._counts, self._found.outputs.passes, self._like)
                if units:
                    self._take(units, plan, shown)
                if rest:
                    self._take_rest(rest, plan, shown)
                for unit in [*units, *([rest] if rest else [])]:
                    unit.contract(total, plan.work)
        return total.result()

    def _take(self, units: Sequence[Unit], plan: Plan, shown) -> None:
        layers = list({unit.layer.name: unit.layer for unit in units}.values())
        for side, samples, x in self._batches(plan.batch):
            captured = self._captured(x, layers)
            for unit in units:
                unit.take(side, samples, captured[unit.layer.name], plan.work)
            shown.update()

    def _take_rest(self, rest: Rest, plan: Plan, shown) -> None:
        names = list(dict.fromkeys(part.name for part in rest.parts))
        for side, samples, x in self._batches(plan.rest_batch):
            for a, cotangent in enumerate(self._found.outputs.cotangents):
                rest.take(side, samples, a, sample_gradients(self._network, x, names, cotangent))
            shown.update()

    def sketched(self, plan: Plan, sums: int, seed: int) -> Tensor:
        """Return the kernel of count sketches of the gradients, in one pass over all inputs."""
        layers, rest = self._found.layers, list(self._found.rest)
        units = [Rows(layer, [key]) for layer in layers for key in layer.parameters]
        names = [unit.layer.parameters[unit.keys[0]] for unit in units]
        numels = {name: self._network.weights[name].numel() for name in [*names, *rest]}
        folds = {
            name: Fold(numel, sums, seed * 2**20 + i, self._like.device)
            for i, (name, numel) in enumerate(sorted(numels.items()))
        }
        total, passes = self._total(), self._found.outputs.passes
        sketches = [self._like.new_zeros(n, passes, sums, dtype=total.dtype) for n in self._counts]
        steps = self._number(plan.batch) * bool(units) + self._number(plan.rest_batch) * bool(rest)
        with bar(text="ntk", unit="batches", total=steps, show=self._progress, every=60) as shown:
            for side, samples, x in self._batches(plan.batch) if units else ():
                captured = self._captured(x, layers)
                for unit, name in zip(units, names):
                    for part, rows in unit.rows(captured[unit.layer.name], len(x), plan.work):
                        start, folded = samples.start + part.start, folds[name](rows.flatten(0, 1).to(total.dtype))
                        sketches[side][start : start + len(rows)] += folded.unflatten(0, rows.shape[:2])
                shown.update()
            for side, samples, x in self._batches(plan.rest_batch) if rest else ():
                for a, cotangent in enumerate(self._found.outputs.cotangents):
                    for name, rows in sample_gradients(self._network, x, rest, cotangent).items():
                        sketches[side][samples, a] += folds[name](rows.to(total.dtype))
                shown.update()
        total.add_rows(sketches[0], sketches[-1])
        return total.result()

    def _captured(self, x: Tensor, layers: Sequence[Layer]) -> dict[str, Captured]:
        """Return the calls of some layers on a batch, with the gradients of their outputs in each backward pass."""
        logits, calls = self._network.record(x, {layer.name: layer.module for layer in layers})
        expected = self._found.signature
        if signature(calls, len(x)) != {layer.name: expected[layer.name] for layer in layers}:
            raise ValueError("the layers that the network calls depend on its inputs; a kernel needs one function")
        if not logits.isfinite().all():
            raise ValueError(f"the model's outputs are not finite (dtype {logits.dtype})")
        cotangents = self._found.outputs.cotangents
        each = [
            gradients(logits, cotangent, calls, keep=a + 1 < len(cotangents)) for a, cotangent in enumerate(cotangents)
        ]
        found: dict[str, list] = {}
        for call, *ds in zip(calls, *each):
            found.setdefault(call.layer, []).append((call, ds))
        return found

    def _number(self, size: int) -> int:
        return sum(-(-n // size) for n in self._counts)

    def _batches(self, size: int) -> Iterator[tuple[int, slice, Tensor]]:
        for side, inputs in enumerate(self._inputs):
            for start in range(0, len(inputs), size):
                samples = slice(start, min(start + size, len(inputs)))
                yield side, samples, self._network.batch(inputs[samples])
