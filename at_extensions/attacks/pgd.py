"""PGD in the Linf ball on any loss of the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from at_extensions.checks import check_count, check_eps, check_name, check_number, check_range

Loss = Callable[[Tensor], Tensor]
"""A loss that an attack maximises: logits (B, K) to a scalar or (B,); everything else it needs is bound to it."""

STARTS = ("uniform", "gaussian", "zero")


class PGD(torchattacks.PGD):
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083) as torchattacks has it, on a loss of yours.

    x_0 = x + noise;  x_{t+1} = clip(x_t + alpha sign(grad loss(f(x_t)))) to the eps-ball around x and to [0, 1], or
    to another range of images.

    Args:
        model: Classifier of images in [0, 1].
        eps: Linf radius in (0, 1].
        alpha: Step size.
        steps: Gradient steps, at least 1.
        start: ``"uniform"`` in the eps-ball, ``"gaussian"`` (0.001 N(0, 1), as in TRADES) or ``"zero"``.
        image_range: Range of the images.

    Attributes:
        image_range: As given; ``Method.image_range`` and ``data`` with a range of their own set it.

    Raises:
        TypeError: An ``image_range`` that is not two numbers.
        ValueError: A number out of range or an unknown start.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        start: str = "uniform",
        image_range: tuple[float, float] = (0.0, 1.0),
    ):
        eps = check_eps(eps)
        alpha = check_number("alpha", alpha, above=0)
        steps = check_count("steps", steps)
        self.start = check_name("start", start, STARTS)
        self.image_range = check_range(image_range)
        super().__init__(model, eps=eps, alpha=alpha, steps=steps, random_start=start != "zero")

    def forward(self, images: Tensor, labels: Tensor, loss: Loss | None = None) -> Tensor:
        """Return adversarial examples (B, C, H, W) in ``image_range``.

        Args:
            images: (B, C, H, W) in ``image_range``.
            labels: (B,); with a ``loss`` of your own they are only used by it.
            loss: Loss to maximise; None means cross-entropy with ``labels`` (or minus the one with the targets, in
                torchattacks' targeted modes).
        """
        images, labels = beside_model(self, images, labels)
        if loss is None:
            loss = cross_entropy(self, images, labels)
        radius = self.radius(images, labels)
        lowest, highest = self.image_range
        low, high = (images - radius).clamp_(min=lowest), (images + radius).clamp_(max=highest)
        adversarial = start(images, self.start, radius).clamp_(low, high)
        for _ in range(self.steps):
            gradient = input_gradient(self, adversarial, loss)
            adversarial = torch.add(adversarial, gradient.sign_(), alpha=self.alpha).clamp_(low, high)
        return adversarial

    def radius(self, images: Tensor, labels: Tensor) -> float | Tensor:
        """Return the radius of the ball: one number, or one an image (B, 1, 1, 1) in attacks that derive from this."""
        return self.eps


def beside_model(attack: torchattacks.attack.Attack, *tensors: Tensor) -> list[Tensor]:
    """Return the tensors, detached, on the device where the attacked model is by now."""
    attack.device = next((p.device for p in attack.model.parameters()), attack.device)
    return [tensor.detach().to(attack.device) for tensor in tensors]


def cross_entropy(attack: torchattacks.attack.Attack, images: Tensor, labels: Tensor) -> Loss:
    """Return the loss of torchattacks' modes: cross-entropy, or minus it toward the targets."""
    if attack.targeted:
        targets = attack.get_target_label(images, labels)
        return lambda logits: -F.cross_entropy(logits, targets)
    return lambda logits: F.cross_entropy(logits, labels)


def start(images: Tensor, kind: str, radius: float | Tensor) -> Tensor:
    """Return a new tensor: the images moved to a random start, neither projected nor clipped yet."""
    if kind == "uniform" and isinstance(radius, Tensor):
        return torch.empty_like(images).uniform_(-1, 1).mul_(radius).add_(images)
    if kind == "uniform":
        return torch.empty_like(images).uniform_(-radius, radius).add_(images)
    if kind == "gaussian":
        return torch.randn_like(images).mul_(0.001).add_(images)
    return images.clone()


def input_gradient(attack: torchattacks.attack.Attack, x: Tensor, loss: Loss) -> Tensor:
    """Return d loss / d x at x, as a tensor that may be written to; a loss a sample is summed.

    Where the model computes in half precision, each image's gradient is scaled by a positive factor of its own (one for
    the batch where BatchNorm mixes images), which leaves the signs of the gradient: a confident network's would
    underflow in float16.
    """
    x = x.detach().requires_grad_(True)
    logits = attack.get_logits(x)
    if logits.dtype not in (torch.float16, torch.bfloat16):
        return torch.autograd.grad(_summed(loss(logits)), x)[0]
    precise = logits.detach().float().requires_grad_(True)
    gradient = torch.autograd.grad(_summed(loss(precise)), precise)[0]
    return torch.autograd.grad(logits, x, _scaled(gradient, each=not _mixes(attack.model)).to(logits.dtype))[0]


def _summed(value: Tensor) -> Tensor:
    return value.sum() if value.ndim else value


def _scaled(gradient: Tensor, *, each: bool) -> Tensor:
    """Scale the gradient of logits (B, K) by powers of two, so that its largest entry lies in [0.5, 1)."""
    largest = gradient.abs().amax(1, keepdim=True) if each else gradient.abs().max()
    exponent = torch.frexp(largest).exponent.clamp(min=-120)  # 2^120 is finite
    return torch.ldexp(gradient, -exponent)


def _mixes(model: nn.Module) -> bool:
    """Whether a model's BatchNorm normalises by the batch, so that one image's logits depend on the others."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
