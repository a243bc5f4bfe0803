"""TRADES: cross-entropy on clean images, and a KL term that keeps predictions constant within the ball."""

from __future__ import annotations

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from at_extensions.attacks import PGD, Loss
from at_extensions.checks import check_number
from at_extensions.methods.method import Method, Step, check_takes_loss
from at_extensions.methods.registry import register


@register(
    "trades", "TRADES (Zhang et al. 2019): cross-entropy on clean images, KL of clean and adversarial predictions"
)
class TRADES(Method):
    """TRADES (Zhang et al. 2019, arXiv 1901.08573, equation 5 and algorithm 1).

    With p = softmax f(x) and q = softmax f(x_adv),

        loss = CE(f(x), y) + (beta / B) sum_i KL(p_i || q_i),

    with gradient through p and q alike; x_adv maximises the KL term from x + 0.001 N(0, 1), with p from eval mode and
    fixed. Clean and adversarial images have a forward pass each, so BatchNorm normalises each by its own statistics and
    its running statistics see both in turn. ``joint=True`` forwards them as one batch: one pass, common statistics.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K).
        beta: Weight of the KL term, at least 0 (``1 / lambda`` in the paper).
        joint: Forward clean and adversarial images as one batch.
        eps: Linf radius in (0, 1].
        alpha: Step size of the attack.
        steps: Steps of the attack.
        start: ``"gaussian"`` as in the paper, or ``"uniform"``, as in ``attacks.PGD``. At the image itself KL has
            its minimum and no gradient, so an attack needs a random start.
        attack: Instead an attack on ``model`` that takes a loss, or ``torchattacks.TPGD``, which has this one; eps,
            alpha, steps and start are then unused.
        batchnorm: ``"eval"`` or ``"train"`` during the attack, as in ``Method``.
        twin: Search on a folded twin of the model, as in ``Method``.
        seed: Of the stream of random starts.

    Raises:
        ValueError: A number out of range, an attack on another model, one that maximises another loss, or one without a
            random start.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 6.0,
        joint: bool = False,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        start: str = "gaussian",
        attack: Attack | None = None,
        batchnorm: str = "eval",
        twin: bool | str = "auto",
        seed: int = 0,
    ):
        attack = PGD(model, eps, alpha, steps, start) if attack is None else attack
        own_loss = isinstance(attack, torchattacks.TPGD)
        super().__init__(
            model,
            attack if own_loss else check_takes_loss(attack, "TRADES"),
            batchnorm=batchnorm,
            twin=twin,
            seed=seed,
        )
        if getattr(attack, "random_start", None) is False:
            raise ValueError(
                "the KL term of TRADES has no gradient at the image itself, so an attack from there follows rounding "
                'errors; use start="gaussian" or "uniform"'
            )
        self.beta = check_number("beta", beta, at_least=0)
        self.joint = bool(joint)

    def attack_loss(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Loss | None:
        """Return the KL from the fixed clean predictions; None for TPGD, which computes it itself."""
        if isinstance(self.attack, torchattacks.TPGD):
            return None
        log_p = log_probabilities(self.clean_logits(x))
        return lambda logits: kl(log_p, log_probabilities(logits))

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Forward clean and adversarial images and return CE + beta KL; the step's logits are the adversarial ones."""
        clean, adversarial = forward_both(self.model, x, x_adv, joint=self.joint)
        log_p, log_q = log_probabilities(clean), log_probabilities(adversarial)
        natural, robust = F.nll_loss(log_p, y), self.beta * kl(log_p, log_q)
        terms = {"natural": natural.detach(), "kl": robust.detach()}
        return Step(natural + robust, adversarial, x_adv, terms, clean_logits=clean)


def forward_both(model: nn.Module, x: Tensor, x_adv: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
    """Return the logits (B, K) of clean and of adversarial images, in one forward pass or in two."""
    if joint:
        clean, adversarial = model(torch.cat([x, x_adv])).chunk(2)
        return clean, adversarial
    return model(x), model(x_adv)


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log softmax (B, K), in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the mean over samples of KL(p || q), of log-probabilities (B, K); differentiable in both."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
