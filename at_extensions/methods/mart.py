"""MART: misclassification-aware adversarial training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.attacks import PGD
from at_extensions.checks import check_number
from at_extensions.methods.method import Method, Step
from at_extensions.methods.registry import register
from at_extensions.methods.trades import forward_both, log_probabilities


@register(
    "mart", "MART (Wang et al. 2020): boosted cross-entropy, and a KL term weighted by how wrong the clean image is"
)
class MART(Method):
    """MART (Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples").

    With p = softmax f(x) of the clean image and q = softmax f(x_adv) of its adversarial example,

        loss = BCE(q, y) + (beta / B) sum_i KL(p_i || q_i) (1 - p_i[y_i]),
        BCE(q, y) = -log q[y] - log(1 - max_{k != y} q[k]),

    with gradient through p and q alike. The attack is PGD on cross-entropy. The logarithms are computed from the
    logits, so no small constant is added to probabilities.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K).
        beta: Weight of the KL term, at least 0 (lambda in the paper).
        joint: Forward clean and adversarial images as one batch, as in ``TRADES``.
        eps: Linf radius in (0, 1].
        alpha: Step size of the attack.
        steps: Steps of the attack.
        start: ``"gaussian"``, ``"uniform"`` or ``"zero"``, as in ``attacks.PGD``.
        attack: Any torchattacks attack on ``model`` instead; eps, alpha, steps and start are then unused.
        batchnorm: ``"eval"`` or ``"train"`` during the attack, as in ``Method``.
        twin: Search on a folded twin of the model, as in ``Method``.
        seed: Of the stream of random starts.

    Raises:
        ValueError: A number out of range, or an attack on another model.
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
        super().__init__(model, attack, batchnorm=batchnorm, twin=twin, seed=seed)
        self.beta = check_number("beta", beta, at_least=0)
        self.joint = bool(joint)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Forward clean and adversarial images and return the loss; the step's logits are the adversarial ones."""
        clean, adversarial = forward_both(self.model, x, x_adv, joint=self.joint)
        log_p, log_q = log_probabilities(clean), log_probabilities(adversarial)
        boosted = boosted_cross_entropy(log_q, y).mean()
        divergence = (log_p.exp() * (log_p - log_q)).sum(1)
        wrongness = 1 - log_p.gather(1, y.unsqueeze(1)).squeeze(1).exp()
        weighted = self.beta * (divergence * wrongness).mean()
        terms = {"boosted": boosted.detach(), "kl": weighted.detach()}
        return Step(boosted + weighted, adversarial, x_adv, terms, clean_logits=clean)


def boosted_cross_entropy(log_q: Tensor, y: Tensor) -> Tensor:
    """Return -log q[y] - log(1 - max_{k != y} q[k]) (B,), of log-probabilities (B, K) and classes (B,)."""
    own = y.unsqueeze(1)
    runner_up = log_q.detach().scatter(1, own, -torch.inf).argmax(1, keepdim=True)
    others = log_q.scatter(1, runner_up, -torch.inf).logsumexp(1)  # log of all probability but the runner-up's
    return -log_q.gather(1, own).squeeze(1) - others
