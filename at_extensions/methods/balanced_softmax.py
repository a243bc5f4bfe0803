"""Adversarial training with balanced softmax (AT-BSL), for long-tailed data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from at_extensions.attacks import PGD, ClassEpsPGD, robust_lt_scales
from at_extensions.checks import check_class_counts, check_matching, check_model
from at_extensions.methods.method import Method, Step
from at_extensions.methods.registry import register


@register("at_bsl", "AT-BSL (Yue et al. 2024): balanced softmax on PGD adversarial examples, for long-tailed data")
class BalancedSoftmaxAT(Method):
    """AT-BSL ("Revisiting Adversarial Training under Long-Tailed Distributions", CVPR 2024).

    The attack is PGD on plain cross-entropy; the loss is balanced softmax (Ren et al. 2020, arXiv 2007.10740) on the
    adversarial examples alone, with n_c training images of class c:

        BSL = CE(f(x_adv) + log n, y)

    so the network learns logits for balanced classes; predictions use them as they are.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K).
        class_counts: Training images of each class (K,), all at least 1.
        eps: Linf radius in (0, 1].
        alpha: Step size of the attack.
        steps: Steps of the attack.
        start: ``"uniform"``, ``"gaussian"`` or ``"zero"``, as in ``attacks.PGD``.
        class_eps: Strength in [0, 1) of RobustLT's radii, larger for rare classes (``attacks.robust_lt_scales``); 0
            gives every class eps.
        attack: Any torchattacks attack on ``model`` instead; eps, alpha, steps, start and class_eps are then unused.
        batchnorm: ``"eval"`` or ``"train"`` during the attack, as in ``Method``.
        twin: Whether to search on a folded twin of the model, as in ``Method``.
        seed: Where the stream of random starts begins.

    Raises:
        TypeError: Counts that are not whole numbers.
        ValueError: A number out of range, a class without images, an attack on another model; in the first step,
            another number of counts than of logits.
    """

    def __init__(
        self,
        model: nn.Module,
        class_counts: Sequence[int],
        *,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        start: str = "uniform",
        class_eps: float = 0.0,
        attack: Attack | None = None,
        batchnorm: str = "eval",
        twin: bool | str = "auto",
        seed: int = 0,
    ):
        counts = check_class_counts(class_counts)
        attack = long_tail_pgd(model, counts, eps, alpha, steps, start, class_eps) if attack is None else attack
        super().__init__(model, attack, batchnorm=batchnorm, twin=twin, seed=seed)
        self.register_buffer("log_counts", torch.tensor(counts).to(statistics_like(model)).log(), persistent=False)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Forward the adversarial examples once and return their balanced-softmax loss; logits are without log n."""
        logits = self.model(x_adv)
        return Step(balanced_softmax_loss(logits, y, self.log_counts), logits, x_adv)


def balanced_softmax_loss(logits: Tensor, y: Tensor, log_counts: Tensor) -> Tensor:
    """Return CE(logits + log n, y) (balanced softmax), averaged over the batch.

    Args:
        logits: (B, K).
        y: Class numbers (B,).
        log_counts: log n (K,); any constant may be added to it.

    Raises:
        ValueError: Another number of counts than of logits.
    """
    check_matching(len(log_counts), logits.shape[-1])
    return F.cross_entropy(logits.to(log_counts.dtype) + log_counts, y)


def long_tail_pgd(
    model: nn.Module, counts: Sequence[int], eps: float, alpha: float, steps: int, start: str, class_eps: float
) -> PGD:
    """Return PGD, with RobustLT's radii where their strength is not 0."""
    if class_eps == 0:
        return PGD(model, eps, alpha, steps, start)
    return ClassEpsPGD(model, robust_lt_scales(counts, class_eps), eps, alpha, steps, start)


def statistics_like(model: nn.Module) -> Tensor:
    """Return an empty tensor where, and as precise as, numbers about the classes are kept: float32 or float64."""
    weights = [p for p in check_model(model).parameters() if p.is_floating_point()]
    if not weights:
        return torch.empty(0)
    return torch.empty(0, device=weights[0].device, dtype=torch.promote_types(weights[0].dtype, torch.float32))
