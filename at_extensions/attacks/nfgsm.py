"""N-FGSM: one gradient step from strong noise, without projecting to the eps-ball."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.attacks.pgd import Loss, beside_model, cross_entropy, input_gradient, start
from at_extensions.checks import check_eps, check_number, check_range


class NFGSM(Attack):
    """N-FGSM (de Jorge et al. 2022, "Make Some Noise", arXiv 2202.01181): noise of k eps, then a step of alpha.

    x' = clip(x + U(-k eps, k eps));  x_adv = clip(x' + alpha sign(grad loss(f(x')))), clipped to [0, 1] alone, or to
    another range of images. The perturbation therefore reaches k eps + alpha, which keeps single-step training from
    catastrophic overfitting.

    Args:
        model: Classifier of images in [0, 1].
        eps: Linf radius in (0, 1] that is trained for.
        alpha: Step size; None means eps.
        k: Noise radius in units of eps, at least 0.
        image_range: Range of the images.

    Raises:
        TypeError: An ``image_range`` that is not two numbers.
        ValueError: A number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float | None = None,
        k: float = 2.0,
        image_range: tuple[float, float] = (0.0, 1.0),
    ):
        super().__init__("NFGSM", model)
        self.eps = check_eps(eps)
        self.alpha = self.eps if alpha is None else check_number("alpha", alpha, above=0)
        self.k = check_number("k", k, at_least=0)
        self.image_range = check_range(image_range)
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor, loss: Loss | None = None) -> Tensor:
        """Return adversarial examples of images (B, C, H, W), in ``image_range``; ``loss`` as in ``PGD``."""
        images, labels = beside_model(self, images, labels)
        if loss is None:
            loss = cross_entropy(self, images, labels)
        noisy = start(images, "uniform", self.k * self.eps).clamp_(*self.image_range)
        gradient = input_gradient(self, noisy, loss)
        return torch.add(noisy, gradient.sign_(), alpha=self.alpha).clamp_(*self.image_range)
