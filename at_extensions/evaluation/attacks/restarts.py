"""PGD with random restarts, on the images alone that are not fooled yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from at_extensions.evaluation.attacks.apgd import is_clearly_fooled

NORMS = ("Linf", "L2")


class RestartedPGD:
    """PGD-50 with ten random restarts, the usual evaluation of single-step training (Wong et al. 2020, 2001.03994).

    x_0 = clip(x + U), U uniform in the ball; x_{t+1} = clip(x_t + alpha g), clipped to the ball around x and to [0, 1],
    with g the sign of the gradient of cross-entropy in Linf, and the gradient over its length in L2. An image counts as
    fooled if any of its iterates is misclassified, the last one included. It then leaves the batch, and takes part in
    no further restart; the others continue as they would have with it, since each image's random starts depend on
    ``seed``, the restart and the image's place in the batch alone.

    Attributes are AutoAttack's, under its names where it has them, and may be changed.

    Args:
        predict: Classifier of images (B, C, H, W) that returns logits (B, K).
        norm: ``"Linf"`` or ``"L2"``.
        eps: Radius.
        alpha: Step size; None means eps / 4 (2/255 at 8/255).
        n_iter: Steps of a run.
        n_restarts: Runs, each from a new random start.
        seed: Of the random starts.
        device: Where the attack runs; the images' device if None.
        verbose: AutoAttack's; nothing is printed.

    Raises:
        ValueError: Another norm.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor] | None,
        *,
        norm: str = "Linf",
        eps: float,
        alpha: float | None = None,
        n_iter: int = 50,
        n_restarts: int = 10,
        seed: int | None = 0,
        device: torch.device | str | None = None,
        verbose: bool = False,
    ):
        if norm not in NORMS:
            raise ValueError(f"PGD with restarts is defined for {' and '.join(NORMS)}, not for {norm!r}")
        self.predict, self.norm, self.eps = predict, norm, eps
        self.alpha = eps / 4 if alpha is None else alpha
        self.n_iter, self.n_restarts, self.seed = n_iter, n_restarts, seed
        self.device, self.verbose = device, verbose

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Return images (B, C, H, W) in which those that PGD fools are adversarial examples.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            y: Their classes (B,). Images that are misclassified already are not attacked.
        """
        generator = torch.Generator(x.device).manual_seed(self.seed or 0)
        x_adv = x.clone()
        with torch.no_grad():
            rows = (self.predict(x).argmax(1) == y).nonzero().flatten()
        for _ in range(self.n_restarts):
            start = self._start(x, generator)
            if not len(rows):
                break
            found, fooled = self._run(x[rows], y[rows], start[rows])
            x_adv[rows[fooled]] = found[fooled]
            rows = rows[~fooled]
        return x_adv

    def _run(self, x: Tensor, y: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return each image's last misclassified iterate and whether there was one (B,), for a single run."""
        found, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        rows, point = torch.arange(len(x), device=x.device), self._projected(start, x)
        for step in range(self.n_iter + 1):
            with torch.enable_grad():
                point.requires_grad_()
                logits = self.predict(point)
                loss = F.cross_entropy(logits, y[rows], reduction="sum")
                gradient = torch.autograd.grad(loss, point)[0] if step < self.n_iter else None
            point, logits = point.detach(), logits.detach()
            wrong = logits.argmax(1) != y[rows]
            found[rows[wrong]] = point[wrong]
            fooled[rows[wrong]] = True
            if gradient is None:
                break
            going_on = ~(wrong & is_clearly_fooled(logits, y[rows]))
            if not going_on.any():
                break
            rows, point, gradient = rows[going_on], point[going_on], gradient[going_on]
            point = self._projected(point + self.alpha * self._direction(gradient), x[rows])
        return found, fooled

    def _start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random point of the ball around each image, not clipped to [0, 1]."""
        if self.norm == "Linf":
            noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            return x + self.eps * (2 * noise - 1)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        radius = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
        return x + self.eps * radius * noise / _length(noise)

    def _direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.norm == "Linf" else gradient / _length(gradient)

    def _projected(self, point: Tensor, x: Tensor) -> Tensor:
        if self.norm == "Linf":
            return torch.clamp(point, x - self.eps, x + self.eps).clamp_(0, 1)
        move = point - x
        return (x + move * (self.eps / _length(move)).clamp(max=1)).clamp_(0, 1)


def _length(images: Tensor) -> Tensor:
    """Return each image's Euclidean length (B, 1, 1, 1), and 1 for one of zeros."""
    length = images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.where(length > 0, length, 1)
