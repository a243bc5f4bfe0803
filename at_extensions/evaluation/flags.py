"""Flags: reasons why an evaluation may overestimate robustness. AutoAttack's checks, side-effect-free, and more."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from at_extensions.checks import looks_like_probabilities
from at_extensions.evaluation.precision import rounding

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Flag:
    """A caveat of an evaluation.

    Attributes:
        name: Its kind, such as ``"randomized"``.
        message: One sentence for people.
        overestimates: Whether robustness may be less than reported, which makes the report unreliable.
    """

    name: str
    message: str
    overestimates: bool = True


def inspect(model: Predict, x: Tensor, y: Tensor, *, version: str = "standard") -> list[Flag]:
    """Run the checks that need only the model and one batch.

    They detect probabilities instead of logits, saturated logits, gradients at inference, random outputs, and outputs
    that depend on the other images of a batch.

    Args:
        model: The model as given.
        x: Images (B, C, H, W).
        y: Their classes (B,).
        version: AutoAttack's; ``"rand"`` is meant for randomised models.
    """
    logits = model(x)
    found = [_probabilities(logits), _logit_scale(logits), _gradients_at_inference(model, x)]
    randomized = _randomized(model, x, y)
    if randomized is None:
        found.append(_batch_dependent(model, x, logits))
    elif version != "rand":
        found.append(randomized)
    return [flag for flag in found if flag is not None]


def _randomized(model: Predict, x: Tensor, y: Tensor, passes: int = 5, tolerance: float = 1e-4) -> Flag | None:
    outputs = [model(x).float() for _ in range(passes)]
    right = torch.stack([(output.argmax(1) == y).sum() for output in outputs])
    unit = torch.stack([torch.nn.functional.normalize(output, dim=1, eps=1e-10) for output in outputs])
    difference = max((unit[i + 1 :] - unit[i]).norm(dim=2).max().item() for i in range(passes - 1))
    if difference <= tolerance and (right == right[0]).all():
        return None
    return Flag(
        "randomized",
        f"the model's answers differ between passes (normalised logits differ by up to {difference:.2g}); "
        'use version="rand", which averages gradients over its randomness',
    )


def _batch_dependent(model: Predict, x: Tensor, logits: Tensor, alone: int = 4) -> Flag | None:
    """Compare logits (B, K) of a batch with those of its two halves, and with those of its first images alone.

    An image that is alone in its batch is joined by its negative instead.
    """
    size = len(x) // 2
    parts = (x[:size], x[size:]) if size else (torch.cat([x, 1 - x]),)
    try:
        others = [torch.cat([model(part) for part in parts])[: len(x)]]
        others.append(torch.cat([model(x[i : i + 1]) for i in range(min(alone, len(x)))]))
    except Exception as error:  # such as BatchNorm's, which takes no statistics of a single value
        found = f"it fails on a part of a batch that it classifies ({type(error).__name__}: {error})"
    else:
        spread = logits.float().std().clamp_min(1e-12)
        difference = max((part - logits[: len(part)]).float().abs().max().item() for part in others) / spread.item()
        if difference <= rounding(x.device):
            return None
        found = f"logits differ by up to {difference:.2g} of their spread"
    return Flag(
        "batch_dependent",
        "the model's answer for an image depends on the other images of the batch (BatchNorm without running "
        f"statistics, or in train mode?): {found}; verdicts hold for these batches alone",
    )


def _probabilities(logits: Tensor) -> Flag | None:
    if not looks_like_probabilities(logits):
        return None
    return Flag("probabilities", "the model returns probabilities; without its softmax, gradients would not vanish")


def _logit_scale(logits: Tensor, margin: float = 60.0, share: float = 0.01) -> Flag | None:
    """Cross-entropy's gradient is of the size of exp(-margin); backpropagated, it underflows."""
    first, second = logits.float().topk(2, dim=1).values.unbind(1)
    saturated = (first - second > margin).double().mean().item()
    if saturated < share:
        return None
    return Flag(
        "logit_scale",
        f"the logits of {100 * saturated:.0f} % of the images are more than {margin:.0f} apart, so that the gradient "
        "of cross-entropy vanishes; divide them by a constant",
    )


def _gradients_at_inference(model: Predict, x: Tensor) -> Flag | None:
    with _GradientWatch() as watch, torch.enable_grad():
        model(x)
    if not watch.seen:
        return None
    return Flag(
        "dynamic",
        "the model computes gradients while it predicts (a defence that optimises at inference); AutoAttack may be too "
        "weak for it, use an adaptive attack",
    )


class _GradientWatch(TorchFunctionMode):
    """Notices calls of autograd, without a tracer (``sys.settrace`` belongs to debuggers and coverage)."""

    def __init__(self):
        super().__init__()
        self.seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen |= func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        return func(*args, **(kwargs or {}))


class Warnings:
    """A logger for APGD, whose only warning is about gradients that are zero at a random start."""

    def __init__(self):
        self.zero_gradients = 0

    def log(self, message: str) -> None:
        """Note a warning of upstream's ``autoattack``."""
        points = re.search(r"(\d+) points with zero gradient", message)
        if points:
            self.zero_gradients = max(self.zero_gradients, int(points[1]))

    warning = log  # the name in pyautoattack


def zero_gradients(count: int) -> Flag | None:
    """Return a flag if attacks met gradients that are zero, at ``count`` samples."""
    if not count:
        return None
    return Flag(
        "zero_gradient",
        f"the gradient was zero at the start of an attack on {count} samples; gradient-based attacks cannot move there",
    )


def nondeterministic(count: int, total: int, margin: float = 0.002) -> Flag | None:
    """Return a flag if the model changed its prediction of more than a share of ``margin`` of ``total`` samples."""
    if count <= margin * total:
        return None
    return Flag(
        "nondeterministic",
        f"{count} images that the model had classified correctly were misclassified in a second pass in another batch; "
        "it is not deterministic, or its answers depend on the batch",
    )


def square_improves(after_attack: Mapping[str, float], total: int, margin: float = 0.002) -> Flag | None:
    """Return a flag if Square, which needs no gradient, fools the model where gradient-based attacks did not.

    AutoAttack warns beyond 0.2 points. With fewer than 1,000 samples that may be a single one, which is no evidence;
    at least two are needed here.

    Args:
        after_attack: Robust accuracy after each attack, in order.
        total: How many samples there are.
        margin: Largest difference of accuracies, as a fraction, without a flag.
    """
    others = [accuracy for name, accuracy in after_attack.items() if name != "square"]
    if "square" not in after_attack or not others:
        return None
    gain = min(others) - after_attack["square"]
    if gain <= margin or round(gain * total) < 2:
        return None
    return Flag(
        "square_improves",
        f"Square, without gradients, lowered robust accuracy by another {100 * gain:.2f} points; the gradients may be "
        "masked, try an adaptive attack",
    )
