"""Accuracy on clean images, or under any torchattacks attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.attacks import RandomStream, attacking, check_attack, perturb, range_of
from at_extensions.checks import check_count, check_logits, check_model, check_range, device_of
from at_extensions.evaluation.precision import check_precision
from at_extensions.evaluation.samples import Samples, as_images, as_labels, is_array
from at_extensions.evaluation.searching import search_model
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
    image_range: tuple[float, float] | None = None,
) -> float:
    """Return the share of samples that the model, in eval mode, classifies correctly, clean or under an attack.

    The model and the global random state are left as they were. Images are cast to the model's floating type.

    Args:
        model: Classifier of images in [0, 1].
        data: Images (N, C, H, W) in [0, 1], as a float tensor or NumPy array; a map-style dataset of (image, label); or
            an iterable of batches (images (B, C, H, W), labels (B,), ...), such as a loader.
        labels: Class numbers (N,), for images in a tensor or array.
        attack: A torchattacks attack on this model; None measures clean accuracy.
        batch_size: Samples a batch, where ``data`` does not come in batches.
        seed: Of the attack's random draws: the same call gives the same number.
        search: ``"fp32"`` or ``"bf16"``: the attack searches in that precision on the model with its BatchNorm folded,
            which is faster; the model itself classifies the adversarial examples. None searches on the model itself.
        image_range: Range of the images. None means that of ``data``, where it has one as splits and loaders do; else
            that of the attack, which is [0, 1] unless it was made with another.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Images or labels out of range, an attack on another model or in another range, no samples.
    """
    limits = _limits(data, attack, image_range)
    counts = _count(model, data, labels, attack, batch_size, seed, search, limits, check=True)
    correct, total, foreign, outside = counts.tolist()
    if total == 0:
        raise ValueError("the data holds no samples")
    if foreign:
        raise ValueError(f"{foreign} labels are not class numbers of the model; they must lie in [0, K) for K logits")
    if outside:
        raise ValueError(
            f"{outside} images hold values outside [{limits[0]:g}, {limits[1]:g}]; normalisation belongs inside the "
            "model (create_model(..., mean=, std=)), not in the data"
        )
    return correct / total


def count_correct(
    model: nn.Module,
    data: Any,
    labels: Tensor | None = None,
    *,
    attack: Attack | None = None,
    batch_size: int = 250,
    seed: int = 0,
    search: str | None = None,
    image_range: tuple[float, float] | None = None,
) -> Tensor:
    """Return the numbers of correctly classified samples and of samples, as a tensor (2,) on the model's device.

    Arguments as in ``accuracy``. Batches of an iterable are not checked for their range of values, so that the host is
    not synchronised with the device. Counts of several processes can be added up.
    """
    return _count(model, data, labels, attack, batch_size, seed, search, _limits(data, attack, image_range))[:2]


def predictions(
    model: nn.Module,
    data: Any,
    labels: Tensor | None = None,
    *,
    attack: Attack | None = None,
    batch_size: int = 250,
    seed: int = 0,
    search: str | None = None,
    image_range: tuple[float, float] | None = None,
) -> Tensor:
    """Return the predicted class of each sample, clean or under an attack against its label, as int64 (N,) on the CPU.

    Arguments as in ``accuracy``.
    """
    found: list[Tensor] = []
    limits = _limits(data, attack, image_range)

    def judge(_: Tensor, logits: Tensor, y: Tensor) -> None:
        found.append(logits.argmax(1))

    _judge(model, data, labels, attack, batch_size, seed, search, limits, judge)
    return torch.cat(found).cpu()


def count_correct_by_class(
    model: nn.Module,
    data: Any,
    num_classes: int,
    *,
    attack: Attack | None = None,
    batch_size: int = 250,
    seed: int = 0,
    search: str | None = None,
    image_range: tuple[float, float] | None = None,
) -> Tensor:
    """Return ``count_correct`` of each class, as a tensor (num_classes, 2) on the model's device."""
    counts = torch.zeros(num_classes, 2, dtype=torch.long, device=device_of(check_model(model)))
    limits = _limits(data, attack, image_range)

    def judge(_: Tensor, logits: Tensor, y: Tensor) -> None:
        add_by_class(counts, logits, y)

    _judge(model, data, None, attack, batch_size, seed, search, limits, judge)
    return counts


def add_by_class(counts: Tensor, logits: Tensor, y: Tensor) -> None:
    """Add numbers of correctly classified samples and of samples to each class's row of ``counts`` (K, 2)."""
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
    limits: tuple[float, float],
    check: bool = False,
) -> Tensor:
    """Numbers of correct samples, samples, labels without a logit and, if ``check``, images outside ``limits`` (4,)."""
    counts = torch.zeros(4, dtype=torch.long, device=device_of(check_model(model)))

    def judge(x: Tensor, logits: Tensor, y: Tensor) -> None:
        counts[0] += (logits.argmax(1) == y).sum()
        counts[1] += len(y)
        counts[2] += ((y < 0) | (y >= logits.shape[1])).sum()
        if check:
            counts[3] += (~((x >= limits[0]) & (x <= limits[1]))).flatten(1).any(1).sum()  # NaN too

    _judge(model, data, labels, attack, batch_size, seed, search, limits, judge)
    return counts


def _judge(
    model: nn.Module,
    data: Any,
    labels: Tensor | None,
    attack: Attack | None,
    batch_size: int,
    seed: int,
    search: str | None,
    limits: tuple[float, float],
    judge: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Call ``judge`` with the images of each batch, and the logits and labels of the images or adversarial examples."""
    device, dtype = device_of(model), _floating_type(model)
    check_count("batch_size", batch_size)
    if search is not None:
        check_precision("search", search, device)
    if attack is not None:
        check_attack(attack, model)
    stream, searched = RandomStream(seed), None
    with random_state_kept(), attacking(model), torch.no_grad():
        for x, y in _batches(data, labels, batch_size, limits):
            x, y = x.to(device, dtype, non_blocking=True), y.to(device, torch.int64, non_blocking=True)
            judged = x
            if attack is not None:
                if search is not None and searched is None and not attack._attacks:  # nested attacks have own models
                    searched = search_model(model, x, search)
                judged = perturb(attack, x, y, stream=stream, twin=searched)
            judge(x, check_logits(model(judged), len(x)), y)


def _floating_type(model: nn.Module) -> torch.dtype:
    """The type of a model's first floating-point parameter; float32 without one."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _limits(data: Any, attack: Attack | None, given: tuple[float, float] | None) -> tuple[float, float]:
    """Return the range of the images; an attack must clip to it."""
    limits = getattr(data, "image_range", None) if given is None else check_range(given)
    if attack is None:
        return limits or (0.0, 1.0)
    clipped = range_of(check_attack(attack))
    if limits is not None and clipped != limits:
        raise ValueError(
            f"{attack.attack} clips images to [{clipped[0]:g}, {clipped[1]:g}], but these lie in [{limits[0]:g}, "
            f"{limits[1]:g}]; use attacks.PGD or attacks.NFGSM with image_range={limits}"
        )
    return clipped


def _batches(data: Any, labels: Any, batch_size: int, limits: tuple[float, float]) -> Iterator[tuple[Tensor, Tensor]]:
    if is_array(data) or _is_dataset(data):
        samples = Samples(data, labels, limits=limits)
        for rows in torch.arange(len(samples)).split(batch_size):
            yield samples.fetch(rows)
        return
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a tensor or array of images, a dataset or batches, got {type(data).__name__}")
    if labels is not None:
        raise TypeError("labels are for a tensor or array of images; batches have their own")
    for x, y, *_ in data:
        x, y = as_images(x), as_labels(y)
        if y.shape != x.shape[:1]:
            raise ValueError(f"a batch of {len(x)} images came with labels of shape {tuple(y.shape)}")
        if y.is_floating_point() or y.dtype == torch.bool:
            raise TypeError(f"labels must be class numbers of an integer dtype, got {y.dtype}")
        yield x, y


def _is_dataset(data: Any) -> bool:
    """Whether items are samples; those of a list of batches are not."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or len(data) == 0:
        return False
    image = data[0][0]
    return not (is_array(image) and image.ndim == 4)
