"""GradAlign: a penalty on input gradients that differ within the eps-ball, against catastrophic overfitting."""

from __future__ import annotations

import warnings

import torch
import torchattacks
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchattacks.attack import Attack

from at_extensions.attacks import NFGSM, PGD, Loss, RandomStream, norm_of, radius_of
from at_extensions.checks import check_name, check_number
from at_extensions.folding import count_steps
from at_extensions.methods.fgsm import FGSMAT
from at_extensions.methods.method import Method, Step
from at_extensions.methods.registry import register
from at_extensions.methods.wrapping import Wrapping
from at_extensions.untouched import in_attack_mode, twice_differentiable

ANCHORS = ("start", "attack")
"""Where the gradient to align with is taken: at the attack's start, or at its end point."""

_SEED = 104_729  # apart from the attack's stream, whose start would otherwise be the very point of the second gradient
_CROSS_ENTROPY = (PGD, NFGSM, torchattacks.PGD, torchattacks.FGSM, torchattacks.FFGSM)


class GradAlign(Wrapping):
    """GradAlign (Andriushchenko and Flammarion 2020, arXiv 2007.02617) around a single-step method.

    With g(x) the input gradient of the cross-entropy, training adds to the inner method's loss

        R = weight (1 - mean_i cos(g(a_i), g(x_i + U(-eps, eps)))),

    whose second gradient is differentiated with respect to the weights. A model that is nearly linear in the eps-ball,
    for which one gradient step is a good attack, has R near 0; in catastrophic overfitting R is near ``weight``.
    Samples with a gradient of exactly 0 leave the mean; without any sample R is 0.

    Anchor ``"start"`` takes a_i at the attack's start (the clean image for FGSM, as in the paper; the noisy one for
    RS-FGSM and N-FGSM): the attack's own gradient, which costs no pass where it maximises cross-entropy. ``"attack"``
    takes a_i = x_adv (arXiv 2206.08242), for a forward and a backward pass more. The second gradient costs a forward
    pass and a double backward pass.

    Both gradients are those of the function that the attack searches on: in eval mode with BatchNorm's running
    statistics of before the step, or with ``batchnorm="train"`` by the batch's own. Running statistics are updated by
    the inner method's training pass alone. (The paper's code takes gradients in train mode and so counts a batch
    three times in the running statistics.) The second gradient is computed without ``torch.compile`` and without fused
    attention, which have no second derivative; the rest of a compiled model stays compiled. Over several processes
    each takes the mean of its own samples.

    Args:
        base: The method inside, with a single-step attack in Linf.
        weight: lambda, at least 0; None takes 0.02 * 10^(255 eps / 8) at the attack's present eps, the rule of the
            paper's runs: 0.063 at 4/255, 0.2 at 8/255, 0.63 at 12/255, and 2 from 16/255 on.
        anchor: ``"start"`` or ``"attack"``.
        seed: Of the noise; None derives it from the attack's.

    Raises:
        TypeError: Not a method.
        ValueError: A number out of range, an unknown anchor, or an attack without eps or not in Linf.

    Warns:
        UserWarning: The attack takes several steps, so that the penalty protects from nothing.
    """

    def __init__(self, base: Method, weight: float | None = None, anchor: str = "start", *, seed: int | None = None):
        super().__init__(base)
        self._given = weight if weight is None else check_number("weight", weight, at_least=0)
        self.anchor = check_name("anchor", anchor, ANCHORS)
        _radius(base.attack)
        steps = count_steps(base.attack)
        if steps != 1:
            warnings.warn(
                f"GradAlign keeps single-step attacks from failing; {base.attack.attack} takes {steps} steps, for "
                "which it only costs time",
                stacklevel=2,
            )
        self.keep_first_pass = anchor == "start" or self.keep_first_pass
        self.noise = RandomStream(base.stream.seed + _SEED if seed is None else seed)
        self._start: tuple[Tensor, Tensor, Tensor | None] | None = None  # images, the attack's start, gradient there

    @property
    def weight(self) -> float:
        """The weight lambda at the attack's present eps."""
        return grad_align_weight(_radius(self.attack)) if self._given is None else self._given

    def perturb(self, x: Tensor, y: Tensor, index: Tensor | None = None, *, loss: Loss | None = None) -> Tensor:
        """Return the inner method's adversarial examples, and keep the attack's first gradient."""
        loss = self.attack_loss(x, y, index) if loss is None else loss
        x_adv = super().perturb(x, y, index, loss=loss)
        self._start, first = None, self.first_pass
        if self.anchor == "start" and first is not None and first.images is not None:
            same = loss is None and isinstance(self.attack, _CROSS_ENTROPY) and not self.attack.targeted
            self._start = x, first.images, first.gradient if same else None
        return x_adv

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Return the inner method's step plus R."""
        anchor = self._anchor(x, x_adv, y)
        radius = _radius(self.attack)
        with self.noise.on(x.device):
            noisy = torch.empty_like(x).uniform_(-radius, radius).add_(x)
        moved = input_gradient(self.model, noisy, y, batchnorm=self.batchnorm)
        penalty = self.weight * misalignment(anchor, moved)
        return self.inner.loss(x, x_adv, y, index).plus("grad_align", penalty)

    def _anchor(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Return the first gradient (B, C, H, W), without graph."""
        at = x_adv if self.anchor == "attack" else x
        if self._start is not None and self._start[0] is x:
            at, gradient = self._start[1:]
            if gradient is not None:
                return gradient
        return input_gradient(self.model, at, y, batchnorm=self.batchnorm, graph=False)


def grad_align_weight(eps: float) -> float:
    """Return the weight of GradAlign at a Linf radius: 0.02 * 10^(255 eps / 8), 0.2 at 8/255, at most 2 (16/255).

    The rule is that of the paper's runs on CIFAR-10, up to 16/255; at the radii of digits it would drown the loss.
    """
    return 0.02 * 10 ** min(255 * eps / 8, 2)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, *, batchnorm: str = "eval", graph: bool = True) -> Tensor:
    """Return the gradient of the cross-entropy with respect to the images (B, C, H, W), up to positive factors.

    Each image's gradient is scaled by a constant of its own (one for the batch where BatchNorm mixes images), so that
    a confident network's does not underflow. The model comes back as it was; buffers of the pass are copies, so that a
    later training pass may update them before the graph is differentiated.

    Args:
        model: Classifier.
        x: Images (B, C, H, W).
        y: Class numbers (B,).
        batchnorm: As in ``attacking``.
        graph: Keep the graph, to differentiate the gradient with respect to the weights.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad(), twice_differentiable(model), in_attack_mode(model, batchnorm):
        x = x.detach().requires_grad_(True)
        logits = functional_call(model, buffers, (x,))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            losses = F.cross_entropy(logits, y, reduction="none")
            scaled = losses * _scale(logits.detach(), y, each=batchnorm == "eval")
            return torch.autograd.grad(scaled.sum(), x, create_graph=graph)[0]


def misalignment(fixed: Tensor, moved: Tensor) -> Tensor:
    """Return mean_i (1 - cos(fixed_i, moved_i)) of the samples in which neither is exactly 0; 0 without any.

    Args:
        fixed: Gradients (B, ...), taken as constants.
        moved: Gradients (B, ...).
    """
    fixed, moved = _at_scale_one(fixed.detach()), _at_scale_one(moved)
    lengths = fixed.norm(dim=1) * moved.norm(dim=1)
    counts = lengths > 0
    cosine = (fixed * moved).sum(1) / torch.where(counts, lengths, torch.ones_like(lengths))
    return torch.where(counts, 1 - cosine, torch.zeros_like(cosine)).sum() / counts.sum().clamp_min(1)


def _at_scale_one(gradient: Tensor) -> Tensor:
    """Return gradients as rows, each divided by its largest entry, so that squares neither over- nor underflow."""
    rows = gradient.flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = rows.detach().abs().amax(1, keepdim=True)
    return rows / torch.where(largest > 0, largest, torch.ones_like(largest))


def _scale(logits: Tensor, y: Tensor, *, each: bool) -> Tensor:
    """Return a power of two a sample, (B,), with which the largest entry of d CE / d logits lies in [0.5, 1)."""
    largest = 1 - logits.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)  # of y's own logit, up to its sign
    largest = largest if each else largest.max()
    exponent = torch.frexp(largest).exponent.clamp(min=-100)
    return torch.ldexp(torch.ones_like(largest), -exponent)


def _radius(attack: Attack | None) -> float:
    """Return the Linf radius of an attack.

    Raises:
        ValueError: It has none.
    """
    norm, radius = (None, None) if attack is None else (norm_of(attack), radius_of(attack))
    if norm != "Linf" or radius is None:
        name = "no attack" if attack is None else f"{attack.attack} ({norm or 'unknown norm'}, eps={radius})"
        raise ValueError(f"GradAlign needs a method whose attack has an eps in Linf, such as FGSMAT; got {name}")
    return radius


@register("grad_align", "FGSM-AT with GradAlign (Andriushchenko and Flammarion 2020): aligned input gradients")
def grad_align(
    model: nn.Module,
    *,
    eps: float = 8 / 255,
    weight: float | None = None,
    anchor: str = "start",
    batchnorm: str = "eval",
    twin: bool | str = "auto",
    seed: int = 0,
) -> GradAlign:
    """Build ``GradAlign(FGSMAT(model, variant="plain"))``."""
    base = FGSMAT(model, eps=eps, variant="plain", batchnorm=batchnorm, twin=twin, seed=seed)
    return GradAlign(base, weight, anchor)
