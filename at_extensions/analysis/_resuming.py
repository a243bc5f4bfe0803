"""Repeated forward passes with one layer changed, resumed from stored activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from at_extensions.analysis._recording import Operation, Recording
from at_extensions.untouched import reseed

Run = Callable[[Mapping[str, Tensor]], Tensor]
"""Function from a layer's replacement weights to the logits (B, K) of the batch."""


class Schedule:
    """The order in which layers are visited on a batch, and the activations stored between visits.

    The unchanged forward pass advances from layer to layer. A value is stored until its last reader has run, be that a
    later operation of the unchanged pass or the changed pass of a layer not yet visited. At any moment little more than
    the inputs of one block is held.

    Args:
        recording: The recorded network.
        layers: For each layer, the names of its weights.
        limit: Bytes of activations that may be held; layers that need more run the whole network.

    Attributes:
        resumed: Indices of the layers that are resumed from stored values, in order of visit.
        whole: Indices of the layers that run the whole network.
        idle: Indices of the layers that the logits do not depend on; they are not visited.
    """

    def __init__(self, recording: Recording, layers: Sequence[Sequence[str]], limit: int):
        self._recording = recording
        touched = [recording.touched_by(names) for names in layers]
        self._passes = [recording.compile(operations) for operations in touched]
        self._needs = [
            {slot for op in operations for slot in op.inputs if slot in recording.made} - {op.slot for op in operations}
            for operations in touched
        ]
        self.idle = [i for i, operations in enumerate(touched) if not operations]
        active = sorted((i for i in range(len(layers)) if touched[i]), key=lambda i: touched[i][0].slot)
        self.whole = [i for i in active if recording.bytes_of(self._needs[i]) > limit]
        self.resumed = [i for i in active if recording.bytes_of(self._needs[i]) <= limit]
        while self._lay_out() > limit:
            largest = max(self.resumed, key=lambda i: recording.bytes_of(self._needs[i]))
            self.resumed.remove(largest)
            self.whole.append(largest)

    def _lay_out(self) -> int:
        """Split the unchanged pass among the resumed layers; return the peak number of bytes held."""
        made = self._recording.made
        maker = {op.slot: op for op in self._recording.operations}
        done: set[int] = set()
        self._advances: list[list[Operation]] = []
        self._readers: dict[int, int] = {}
        for i in self.resumed:
            asked, new = list(self._needs[i]), set()
            while asked:
                slot = asked.pop()
                if slot not in done and slot not in new:
                    new.add(slot)
                    asked += maker[slot].inputs & made
            done |= new
            self._advances.append([maker[slot] for slot in sorted(new)])
            for slots in (self._needs[i], *(op.inputs & made for op in self._advances[-1])):
                for slot in slots:
                    self._readers[slot] = self._readers.get(slot, 0) + 1
        held, most = {}, 0
        for _ in self._visit(held, lambda op: None):
            most = max(most, self._recording.bytes_of(set(held)))
        return most

    def _visit(self, held: dict[int, Any], compute: Callable[[Operation], Any]) -> Iterator[int]:
        """Yield the resumed layers in order, each as soon as ``held`` contains its inputs."""
        readers = dict(self._readers)
        for i, advance in zip(self.resumed, self._advances):
            for op in advance:
                held[op.slot] = compute(op)
                _release(op.inputs, readers, held)
            yield i
            _release(self._needs[i], readers, held)

    def over(self, images: Tensor) -> Iterator[tuple[int, Run]]:
        """Yield the index of each visited layer and a function that runs the network with its weights replaced.

        The function is valid until the iterator advances.

        Args:
            images: Images (B, C, H, W) of the recorded shape.
        """
        recording = self._recording
        values = recording.fixed | {recording.image_slot: images}
        for i in self.whole:
            yield i, lambda weights: recording.run(recording.whole, values, weights)
        for i in self._visit(values, lambda op: op(values, values)):
            yield i, lambda weights, part=self._passes[i]: recording.run(part, values, weights)


def _release(slots: Sequence[int] | set[int], readers: dict[int, int], held: dict[int, Any]) -> None:
    """Decrement the number of readers of each slot, and discard values without readers."""
    for slot in slots:
        if slot in readers:
            readers[slot] -= 1
            if readers[slot] == 0:
                del held[slot]


class WholeNetwork:
    """Substitute of ``Schedule`` for a network that cannot be recorded: every reset runs the whole network.

    Args:
        model: The network.
        layers: Number of layers.
        seed: Seed of the global random state before each forward pass.
    """

    def __init__(self, model: nn.Module, layers: int, seed: int):
        self.whole, self.resumed, self.idle = list(range(layers)), [], []
        self._model, self._seed = model, seed

    def over(self, images: Tensor) -> Iterator[tuple[int, Run]]:
        """Yield the index of each layer and a function that runs the network with its weights replaced."""

        def run(weights: Mapping[str, Tensor]) -> Tensor:
            reseed(self._seed)  # a random network draws the same numbers in every pass
            return functional_call(self._model, dict(weights), (images.clone(),))

        for number in self.whole:
            yield number, run
