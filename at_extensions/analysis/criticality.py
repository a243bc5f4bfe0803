"""Layer criticality: the change of a network's predictions when one layer is reset."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.analysis._divergences import DIVERGENCES
from at_extensions.analysis._layer_results import LayerCriticality, half_width, interval_of, standard_deviation
from at_extensions.analysis._resets import Layer, Predicate, Resets, choose_layers, unique_tensors
from at_extensions.analysis._sweeping import Sweeper, batches
from at_extensions.attacks import RandomStream, check_attack, perturb
from at_extensions.checks import check_count, check_images, check_labels, check_model, check_name, check_number
from at_extensions.models import fresh_like
from at_extensions.progress import bar
from at_extensions.untouched import untouched


def layer_criticality(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    fresh: Callable[[int], nn.Module] | None = None,
    trials: int = 3,
    layers: Predicate | Sequence[str] | None = None,
    reset: str | Mapping[str, Tensor] = "random",
    inputs: Attack | None = None,
    divergence: str = "cosine",
    batch_size: int = 64,
    seed: int = 0,
    ci_width: float | None = None,
    max_trials: int = 20,
    memory_limit: int = 2 * 2**30,
    progress: bool = True,
) -> LayerCriticality:
    """Reset one layer at a time and measure the change of the predictions ("Criticality", arXiv 2410.14470).

    With p = softmax f(x), and p' the same after layer l received the tensors of an untrained network drawn with
    ``seed + t``, criticality(l) = 1 - mean over t and x of cos(p, p'). All other tensors stay as trained, including
    BatchNorm's statistics. Every layer is measured on the same images and, in trial t, with the same untrained network.

    The forward pass is recorded as a list of operations, and a reset recomputes only the operations that depend on the
    layer. Where recording is not possible (data-dependent control flow, for example), the whole network runs. The model
    is measured in eval mode and left unchanged.

    The same seed gives the same numbers for any ``memory_limit``, bit for bit on the CPU. Another ``batch_size``
    changes only the rounding of the kernels (about 1e-6 in float32); with a randomly started attack it can also change
    the draws, and therefore the adversarial examples.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K).
        images: (N, C, H, W) in [0, 1]; or uint8, scaled batch by batch. On any device.
        labels: Class numbers (N,), for ``accuracy_after`` and for the attack (which otherwise attacks predictions).
        fresh: ``seed -> module``, an untrained network of the same architecture; None means ``fresh_like``, for models
            that ``create_model`` made. Only ``"random"`` and ``"norm_matched"`` resets use it.
        trials: Resets of each layer, at least 1. Deterministic resets are done once, whatever the number.
        layers: The layers to reset: None for every Conv2d and Linear, names, or a predicate ``(name, module) -> bool``.
            Layers that share a tensor are reset together, with a warning, under the first one's name.
        reset: ``"random"``; ``"norm_matched"``, random tensors scaled to the norm of the trained ones (tensors drawn
            as zero stay zero); ``"permute"``, each trained tensor shuffled; ``"zero"``; or a state dict to rewind to.
            The middle three leave buffers, such as BatchNorm's statistics, as trained.
        inputs: An attack on this model: criticality is measured on its adversarial examples, made once from the
            unchanged model.
        divergence: ``"cosine"``; ``"js"``, Jensen-Shannon in bits; or ``"kl"``, KL(p, p') in nats.
        batch_size: Largest number of images in a batch.
        seed: Seed of the resets and of random forward passes, at least 0.
        ci_width: Add trials to each layer until its 95 % interval is at most this wide. Stopping at the first interval
            that is narrow enough makes intervals slightly too narrow.
        max_trials: Largest number of trials of a layer with ``ci_width``.
        memory_limit: Bytes that may be held to save work, half for untrained weights (those of one network are always
            held) and half for activations. Layers whose inputs do not fit run the whole network.
        progress: Show progress: a bar on a terminal, else lines.

    Returns:
        A ``LayerCriticality``.

    Raises:
        TypeError: An argument of the wrong kind.
        ValueError: Images outside [0, 1] or none, labels out of range, an unknown layer (the message names the nearest
            ones), ``fresh`` or a state dict of another architecture, numbers out of range, logits that are not finite.
    """
    given, model = model, getattr(check_model(model), "_orig_mod", model)  # torch.compile's wrapper renames layers
    _check_data(images, labels)
    _check_numbers(trials, batch_size, seed, ci_width, max_trials, memory_limit)
    check_name("divergence", divergence, DIVERGENCES)
    chosen = choose_layers(model, layers)
    _warn_of_tied(chosen)
    state = unique_tensors(model)
    resets = Resets(reset, fresh or functools.partial(fresh_like, model), seed, state, chosen)
    if inputs is not None:
        images = _adversarial(model, check_attack(inputs, given), images, labels, batch_size, state, seed)
    with untouched(model):
        sweeper = Sweeper(model, state, chosen, images, labels, batch_size, divergence, memory_limit // 2, seed)
        plan = _Plan(trials, max_trials, ci_width, divergence) if resets.repeated else _Plan(1, 1, None, divergence)
        measured = _measure(sweeper, chosen, resets, plan, memory_limit // 2, progress)
    return LayerCriticality(
        values={layer.name: [moved for moved, _ in rows] for layer, rows in zip(chosen, measured)},
        accuracies=None if labels is None else {layer.name: [a for _, a in r] for layer, r in zip(chosen, measured)},
        accuracy=sweeper.accuracy,
        divergence=divergence,
        reset=resets.name,
        inputs=None if inputs is None else inputs.attack,
        n_images=len(images),
        seed=seed,
        ci_width=ci_width,
        exact=not resets.repeated,
        tied={layer.name: list(layer.tied) for layer in chosen if layer.tied},
        whole=[chosen[i].name for i in sorted(sweeper.whole)],
        wrapper=_wrapper(model),
    )


@dataclass
class _Plan:
    """The number of trials of each layer, fixed or until its interval is narrow enough."""

    trials: int
    max_trials: int
    ci_width: float | None
    divergence: str

    def more(self, values: Sequence[float]) -> int:
        """Return the number of trials to add, estimated from the present spread; at most as many as there are."""
        done = len(values)
        if done < self.trials:
            return self.trials
        if self.ci_width is None or done >= self.max_trials:
            return 0
        low, high = interval_of(values, self.divergence)
        if high - low <= self.ci_width:
            return 0
        needed, std = done + 1, standard_deviation(values)
        while needed < min(2 * done, self.max_trials) and 2 * half_width(std, needed) > self.ci_width:
            needed += 1
        return needed - done


def _measure(
    sweeper: Sweeper, layers: Sequence[Layer], resets: Resets, plan: _Plan, limit: int, progress: bool
) -> list[list[list[float]]]:
    """Return the mean divergence and the accuracy of each layer in each trial."""
    rows: list[list[list[float]]] = [[] for _ in layers]
    with bar(text="criticality", unit="resets", total=0, show=progress, every=60) as shown:
        while True:
            counts = [len(row) for row in rows]
            more = [plan.more([moved for moved, _ in row]) for row in rows]
            if not any(more):
                return rows
            shown.total += sum(more) * len(sweeper)
            wanted = [range(n, n + extra) for n, extra in zip(counts, more)]
            for trials in _parts(wanted, [resets.bytes_of(layer) for layer in layers], limit):
                drawn = {}
                for trial in trials:
                    numbers = [i for i, asked in enumerate(wanted) if trial in asked]
                    new = resets.trial(trial, [layers[i] for i in numbers])
                    drawn |= {(i, trial): tensors for i, tensors in zip(numbers, new)}
                for (i, _), row in sweeper.sweep(drawn, shown.update).items():
                    rows[i].append(row)


def _parts(wanted: Sequence[range], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Yield groups of trials whose replacement weights stay within ``limit`` bytes; a group has at least one trial.

    Args:
        wanted: The trials of each layer.
        sizes: The bytes of each layer's weights.
        limit: Bytes of a group.
    """
    part, held = [], 0
    for trial in sorted({t for asked in wanted for t in asked}):
        size = sum(size for size, asked in zip(sizes, wanted) if trial in asked)
        if part and held + size > limit:
            yield part
            part, held = [], 0
        part.append(trial)
        held += size
    yield part


def _adversarial(
    model: nn.Module,
    attack: Attack,
    images: Tensor,
    labels: Tensor | None,
    batch_size: int,
    state: Mapping[str, Tensor],
    seed: int,
) -> Tensor:
    """Return the adversarial examples of all images, on the images' own device."""
    stream, examples = RandomStream(seed), []
    with untouched(model):
        for x, y, n in batches(images, labels, batch_size, state):
            if y is None:
                y = model(x.clone())[:n].argmax(1)
            examples.append(perturb(attack, x[:n], y, stream=stream).to(images.device))
    return torch.cat(examples)


def _check_data(images: Tensor, labels: Tensor | None) -> None:
    if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.numel():
        check_images(images[:1].float() / 255)
    else:
        check_images(images)
    if labels is not None:
        check_labels(labels, size=len(images))


def _check_numbers(
    trials: int, batch_size: int, seed: int, ci_width: float | None, max_trials: int, memory_limit: int
) -> None:
    check_count("trials", trials, at_least=1 if ci_width is None else 2)
    check_count("batch_size", batch_size)
    check_count("seed", seed, at_least=0)
    check_count("memory_limit", memory_limit, at_least=0)
    if ci_width is not None:
        check_number("ci_width", ci_width, above=0)
        check_count("max_trials", max_trials, at_least=trials)


def _warn_of_tied(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if layer.tied:
            others = ", ".join(layer.tied)
            warnings.warn(f"layer {layer.name} shares tensors with {others}; they are reset together", stacklevel=3)


def _wrapper(model: nn.Module) -> str:
    """Return the prefix of all layer names that comes from modules around the network itself."""
    prefix = ""
    while True:
        inner = [(n, m) for n, m in model.named_children() if next(m.parameters(), None) is not None]
        own = next(model.parameters(recurse=False), None)
        if (
            own is not None
            or len(inner) != 1
            or isinstance(inner[0][1], nn.Sequential)
            or not [*inner[0][1].children()]
        ):
            return prefix
        prefix, model = f"{prefix}{inner[0][0]}.", inner[0][1]
