"""Accuracy on clean images, or under any torchattacks attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.attacks import RandomStream, attacking, check_attack, perturb
from at_extensions.checks import check_count, check_logits, check_model, check_name, device_of
from at_extensions.evaluation.samples import Samples
from at_extensions.evaluation.searching import PRECISIONS, search_model
from at_extensions.untouched import random_state_kept


def accuracy(
    model: nn.Module,
    data: Any,
    labels: Tensor | None = None,
    *,
    attack: Attack | None = None,
    batch_size: int = 250,
    seed: int = 0,
    search: str | None = None,
) -> float:
    """Return the share of samples that the model, in eval mode, classifies rightly, as they are or under an attack.

    The model and the global random state are left as they were.

    Args:
        model: Classifier of images in [0, 1].
        data: Images (N, C, H, W) in [0, 1]; a map-style dataset of (image, label); or an iterable of batches
            (images (B, C, H, W), labels (B,), ...), such as a loader.
        labels: Class numbers (N,), for images that come as a tensor.
        attack: A torchattacks attack on this model; None measures clean accuracy.
        batch_size: Samples a batch, where ``data`` does not come in batches.
        seed: Of the attack's random draws: the same call gives the same number.
        search: ``"fp32"`` or ``"bf16"``: the attack searches in that precision on the model with its BatchNorm folded,
            which is faster; what it finds is judged by the model as it is. None searches on the model as it is, too.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Images or labels out of range, an attack on another model, no samples.
    """
    right, total, foreign = _count(model, data, labels, attack, batch_size, seed, search).tolist()
    if total == 0:
        raise ValueError("the data holds no samples")
    if foreign:
        raise ValueError(f"{foreign} labels are no class numbers of the model; they must lie in [0, K) for K logits")
    return right / total


def count_correct(
    model: nn.Module,
    data: Any,
    labels: Tensor | None = None,
    *,
    attack: Attack | None = None,
    batch_size: int = 250,
    seed: int = 0,
    search: str | None = None,
) -> Tensor:
    """Return how many samples are classified rightly, and how many there are, as a tensor (2,) on the model's device.

    Arguments as in ``accuracy``. Nothing waits for the device, and the counts of several processes can be added up.
    """
    return _count(model, data, labels, attack, batch_size, seed, search)[:2]


def count_correct_by_class(
    model: nn.Module,
    data: Any,
    num_classes: int,
    *,
    attack: Attack | None = None,
    batch_size: int = 250,
    seed: int = 0,
    search: str | None = None,
) -> Tensor:
    """Return ``count_correct`` of each class, as a tensor (num_classes, 2) on the model's device."""
    counts = torch.zeros(num_classes, 2, dtype=torch.long, device=device_of(check_model(model)))
    _judge(model, data, None, attack, batch_size, seed, search, lambda logits, y: add_by_class(counts, logits, y))
    return counts


def add_by_class(counts: Tensor, logits: Tensor, y: Tensor) -> None:
    """Add to each class's row of ``counts`` (K, 2) how many samples are classified rightly, and how many there are."""
    rows = torch.stack([logits.argmax(1) == y, torch.ones_like(y, dtype=torch.bool)], 1)
    counts.index_add_(0, y, rows.to(counts.dtype))


def _count(
    model: nn.Module,
    data: Any,
    labels: Tensor | None,
    attack: Attack | None,
    batch_size: int,
    seed: int,
    search: str | None,
) -> Tensor:
    """Samples classified rightly, samples, and labels that the model has no logit for (3,)."""
    counts = torch.zeros(3, dtype=torch.long, device=device_of(check_model(model)))

    def judge(logits: Tensor, y: Tensor) -> None:
        counts[0] += (logits.argmax(1) == y).sum()
        counts[1] += len(y)
        counts[2] += ((y < 0) | (y >= logits.shape[1])).sum()

    _judge(model, data, labels, attack, batch_size, seed, search, judge)
    return counts


def _judge(
    model: nn.Module,
    data: Any,
    labels: Tensor | None,
    attack: Attack | None,
    batch_size: int,
    seed: int,
    search: str | None,
    judge: Callable[[Tensor, Tensor], None],
) -> None:
    """Call ``judge`` with the logits and labels of each batch, as it is or attacked."""
    device = device_of(model)
    check_count("batch_size", batch_size)
    if search is not None:
        check_name("search", search, PRECISIONS)
    if attack is not None:
        check_attack(attack, model)
    stream, searched = RandomStream(seed), None
    with random_state_kept(), attacking(model), torch.no_grad():
        for x, y in _batches(data, labels, batch_size):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if attack is not None:
                if search is not None and searched is None and not attack._attacks:  # those inside have models too
                    searched = search_model(model, x, search)
                x = perturb(attack, x, y, stream=stream, twin=searched)
            judge(check_logits(model(x), len(x)), y)


def _batches(data: Any, labels: Tensor | None, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, Tensor) or _is_dataset(data):
        samples = Samples(data, labels)
        for rows in torch.arange(len(samples)).split(batch_size):
            yield samples.fetch(rows)
        return
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a tensor of images, a dataset or batches, got {type(data).__name__}")
    if labels is not None:
        raise TypeError("labels go with a tensor of images; batches bring their own")
    for x, y, *_ in data:
        if y.shape != x.shape[:1]:
            raise ValueError(f"a batch of {len(x)} images came with labels of shape {tuple(y.shape)}")
        yield x, y


def _is_dataset(data: Any) -> bool:
    """Whether items are samples; a list of batches can be asked for its items too."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or len(data) == 0:
        return False
    image = data[0][0]
    return not (isinstance(image, Tensor) and image.ndim == 4)
