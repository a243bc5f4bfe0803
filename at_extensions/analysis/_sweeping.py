"""One sweep over the images: the resets of every layer measured batch by batch, from stored inputs if possible."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from at_extensions.analysis._divergences import divergence
from at_extensions.analysis._recording import CannotRecordError, Recording
from at_extensions.analysis._resets import Layer
from at_extensions.analysis._resuming import Schedule, WholeNetwork
from at_extensions.checks import check_labels, check_logits, looks_like_probabilities
from at_extensions.untouched import reseed

Weights = Mapping[str, Tensor]
log = logging.getLogger(__name__)


class Sweeper:
    """Measures resets of layers on the same images in one or more sweeps.

    Args:
        model: The network in eval mode, inside the ``untouched`` context.
        state: Its parameters and buffers, each tensor under one name.
        layers: The layers to reset.
        images: Images (N, C, H, W), float in [0, 1] or uint8.
        labels: Class numbers (N,) or None.
        batch_size: Largest number of images in a batch.
        kind: One of ``DIVERGENCES``.
        limit: Bytes of activations that may be held.
        seed: Seed of the global random state before each forward pass.

    Attributes:
        accuracy: Accuracy of the unchanged model, after the first sweep; None without labels.
        whole: Indices of the layers that ran the whole network in any sweep.
    """

    def __init__(
        self,
        model: nn.Module,
        state: Weights,
        layers: Sequence[Layer],
        images: Tensor,
        labels: Tensor | None,
        batch_size: int,
        kind: str,
        limit: int,
        seed: int,
    ):
        self._model, self._state, self._layers = model, state, layers
        self._images, self._labels, self._batch_size = images, labels, batch_size
        self._kind, self._limit, self._seed = kind, limit, seed
        self._recording: Recording | None = None
        self._started = False
        self.accuracy: float | None = None
        self.whole: set[int] = set()

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._images) // self._batch_size)

    def sweep(
        self, resets: Mapping[tuple[int, int], Weights], tick: Callable[[], object] = lambda: None
    ) -> dict[tuple[int, int], list[float]]:
        """Return the mean divergence and the accuracy (0 without labels) after each reset.

        Args:
            resets: (layer, trial) to the replacement tensors of the layer.
            tick: Called after each reset on each batch.

        Raises:
            ValueError: The logits are not (B, K) or not finite, or labels are out of range.
        """
        trials: dict[int, list[int]] = {}
        for layer, trial in resets:
            trials.setdefault(layer, []).append(trial)
        layers = list(trials)
        sums, correct, schedule = dict.fromkeys(resets, 0.0), 0.0, None
        for x, y, n in batches(self._images, self._labels, self._batch_size, self._state):
            reference = self._reference(x, y)[:n]
            schedule = schedule or self._schedule(x, layers)
            log_p, right = F.log_softmax(reference.double(), 1), _right(reference, y)
            correct = correct + right
            for number, run in schedule.over(x):
                for trial in trials[layers[number]]:
                    logits = run(resets[layers[number], trial])[:n]
                    moved = divergence(self._kind, log_p, F.log_softmax(logits.double(), 1)).sum()
                    found = torch.stack([moved, _right(logits, y)])
                    sums[layers[number], trial] = sums[layers[number], trial] + found
                    tick()
            for layer in (layers[number] for number in schedule.idle):
                for trial in trials[layer]:
                    sums[layer, trial] = sums[layer, trial] + torch.stack([torch.zeros_like(right), right])
                    tick()
            self._check_finite(sums)
        if self._labels is not None:
            self.accuracy = float(correct) / len(self._images)
        return {key: (total / len(self._images)).tolist() for key, total in sums.items()}

    def _reference(self, x: Tensor, y: Tensor | None) -> Tensor:
        reseed(self._seed)
        logits = check_logits(self._model(x.clone()), len(x))
        if y is not None:
            check_labels(y, logits.shape[1])
        if not logits.isfinite().all():
            raise ValueError(f"the model's logits are not finite (dtype {logits.dtype})")
        if not self._started and looks_like_probabilities(logits):
            warnings.warn("the model's outputs look like probabilities; they are taken for logits", stacklevel=5)
        return logits

    def _schedule(self, x: Tensor, layers: list[int]) -> Schedule | WholeNetwork:
        if not self._started:
            self._started = True
            try:
                self._recording = self._record(x)
            except CannotRecordError as error:
                log.info("%s runs whole for every reset: %s", type(self._model).__name__, error)
        if self._recording is None:
            schedule = WholeNetwork(self._model, len(layers), self._seed)
        else:
            schedule = Schedule(self._recording, [self._layers[i].tensors for i in layers], self._limit)
        self.whole |= {layers[number] for number in schedule.whole}
        return schedule

    def _record(self, x: Tensor) -> Recording:
        """Record the network, and compare the recording with it on other weights and other images."""
        recording = Recording(self._model, self._state, x)
        other = {name: t.flatten().roll(1).view_as(t) for name, t in self._state.items() if t.is_floating_point()}
        darker = (1 - x) / 2
        recorded = recording.run(recording.whole, recording.fixed | {recording.image_slot: darker}, other)
        actual = functional_call(self._model, other, (darker.clone(),))
        tolerance = torch.finfo(actual.dtype).eps ** 0.7
        scale = float(actual.abs().nan_to_num(posinf=0.0).max())
        if not torch.allclose(recorded, actual, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            raise CannotRecordError("its operations depend on the values of images or weights")
        return recording

    def _check_finite(self, sums: Mapping[tuple[int, int], Tensor]) -> None:
        if torch.stack(list(sums.values())).isfinite().all():
            return
        layer, trial = next(key for key, total in sums.items() if not total.isfinite().all())
        raise ValueError(
            f"with layer {self._layers[layer].name!r} reset (trial {trial}) the logits are not finite; measure in a "
            "wider dtype or leave that layer out (layers=)"
        )


def batches(
    images: Tensor, labels: Tensor | None, batch_size: int, state: Weights
) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Yield batches of one shape (B, C, H, W), the labels of their first n images, and n.

    Batches are as even as ``batch_size`` allows, and the last one is padded with copies of its last image. Images are
    moved to the device and the floating-point type of a model's ``state``.
    """
    like = next((t for t in state.values() if t.is_floating_point()), torch.zeros(0))
    size = -(-len(images) // -(-len(images) // batch_size))
    for start in range(0, len(images), size):
        x = images[start : start + size]
        n = len(x)
        x = torch.cat([x, x[-1:].expand(size - n, *x.shape[1:])]) if n < size else x
        x = x.to(like.device).to(like.dtype).div(255) if x.dtype == torch.uint8 else x.to(like.device, like.dtype)
        yield x, None if labels is None else labels[start : start + size].to(like.device), n


def _right(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the number of correct predictions as a float64 scalar; zero without labels."""
    if labels is None:
        return torch.zeros((), dtype=torch.float64, device=logits.device)
    return (logits.argmax(1) == labels).sum().double()
