"""The verdict on a model that may have overfitted catastrophically: one step against PGD on held-out images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions import processes
from at_extensions.attacks import RandomStream, perturb
from at_extensions.checks import device_of
from at_extensions.untouched import attacking, random_state_kept, uncompiled

_BATCH = 128  # images a pass


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an attack on held-out images found; accuracies are fractions of ``images``.

    Attributes:
        collapsed: Whether the model has overfitted catastrophically.
        clean_accuracy: On the images as they are.
        single_step_accuracy: Under the training attack; under FGSM where that takes several steps.
        pgd_accuracy: Under PGD-10.
        best_pgd_accuracy: The best robust accuracy so far, this one included.
        images: Held-out images, over all processes.
    """

    collapsed: bool
    clean_accuracy: float
    single_step_accuracy: float
    pgd_accuracy: float
    best_pgd_accuracy: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)

    @property
    def reason(self) -> str:
        """The finding in a sentence."""
        found = "catastrophic overfitting" if self.collapsed else "no catastrophic overfitting"
        return (
            f"{found}: on {self.images} held-out images {100 * self.single_step_accuracy:.1f} % under one step, "
            f"{100 * self.pgd_accuracy:.1f} % under PGD (best so far {100 * self.best_pgd_accuracy:.1f} %)"
        )


def count_right(
    model: nn.Module, attacks: tuple[Attack, ...], images: Tensor, labels: Tensor, seed: int
) -> tuple[list[float], int]:
    """Return accuracy without attack and under each attack, in eval mode, and the number of images.

    The counts are summed over the processes, each of which gives its share of the images.

    Args:
        model: The classifier; it comes back as it was, and computes without compiled code.
        attacks: Attacks on it.
        images: (n, C, H, W) in [0, 1].
        labels: Class numbers (n,).
        seed: Of each attack's random starts.
    """
    device = device_of(model)
    right = torch.zeros(len(attacks) + 2, dtype=torch.long, device=device)
    streams = [RandomStream(seed) for _ in attacks]
    for stream in streams:
        stream.spread(processes.rank())
    with uncompiled(model):
        for x, y in zip(images.split(_BATCH), labels.split(_BATCH)):
            x, y = x.to(device), y.to(device)
            points = [x, *(perturb(attack, x, y, stream=stream) for attack, stream in zip(attacks, streams))]
            with attacking(model), torch.no_grad():
                found = [(model(point).argmax(1) == y).sum() for point in points]
            right += torch.stack([*found, torch.full_like(right[0], len(y))])
    *right, n = processes.add_over_ranks(right).tolist()
    if n == 0:
        raise ValueError("there are no held-out images to attack")
    return [count / n for count in right], n


def first_images(batches: Iterable, n: int) -> tuple[Tensor, Tensor]:
    """Return the first ``n`` images of batches and their labels, on the CPU."""
    images, labels = [], []
    with random_state_kept():
        for x, y, *_ in batches:
            images.append(x[: n - sum(map(len, images))].cpu())
            labels.append(y[: len(images[-1])].cpu().long())
            if sum(map(len, images)) >= n:
                break
    if not images:
        raise ValueError("CollapseGuard needs held-out images; the validation loader is empty")
    return torch.cat(images), torch.cat(labels)
