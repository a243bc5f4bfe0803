"""REAT: re-balancing adversarial training for long-tailed data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from at_extensions.attacks import Loss
from at_extensions.checks import check_class_counts, check_matching, check_name, check_number
from at_extensions.data import frequency_groups
from at_extensions.methods.balanced_softmax import (
    balanced_softmax_loss,
    long_tail_pgd,
    statistics_like,
)
from at_extensions.methods.method import Method, Step, check_takes_loss
from at_extensions.methods.registry import register
from at_extensions.models import classifier_of, logits_and_features
from at_extensions.processes import add_over_ranks

VARIANTS = ("released", "pairwise")
"""TAIL and class weights as the released code computes them, or as the paper intends them."""

ATTACK_WEIGHTING = ("loss", "logit")
"""Class weights on each sample's loss in the attack, as released, or on the logits."""

LARGEST_REPULSION = 1.0
"""In nats: the pairwise TAIL pushes two samples of a tail class apart until their KL has reached this."""


@register("reat", "REAT (Li et al. 2023): re-balanced attack and loss, wider tail classes; for long-tailed data")
class REAT(Method):
    """REAT ("Alleviating the Effect of Data Imbalance on Adversarial Training", Li, Xu and Zhang 2023, 2307.10205).

    With n_c training images of class c, N in all, K classes, and m_c adversarial examples that the training forwards of
    the previous epoch predicted as class c (before the first ``epoch_end``, m = n):

    - Weights (effective numbers), rescaled to sum to K:
      E_c = (1 - beta_c^m_c) / (1 - beta_c), beta_c = (n_c - 1) / n_c;  w_c = 1 / (E_c + 1e-5).
    - Attack: PGD that maximises, with ``attack_weighting="loss"``, RBL = sum_i w_{y_i} CE_i / sum_i w_{y_i}; with
      ``"logit"``, CE(f(x) + log w, y).
    - Loss: CE(f(x_adv) + log n, y) + tail_weight TAIL, the first being balanced softmax.
    - TAIL: f_j the penultimate features (B, D) of the adversarial examples, p_j = softmax(f_j), q_i = softmax(f_i)
      without gradient, T_b the batch's samples of tail classes (``data.frequency_groups``), s_ij = -1 where
      y_i = y_j and else +1, W_ij = sqrt(N / n_{y_i}) + sqrt(N / n_{y_j}). It is 0 in a batch without tail samples.

      - ``"pairwise"``: (1 / |T_b|) sum_{i in T_b} (1 / B) sum_j s_ij W_ij KL(q_i || p_j), where the KL of a pair with
        s_ij = -1 counts up to 1 nat.
      - ``"released"``: (1 / |T_b|) sum_{i in T_b} [(1 / (B D)) sum_j KL(q_i || p_j)] [(1 / B) sum_j s_ij W_ij].

    Two things keep the released algorithm from doing what the paper intends, and each has its option here. RBL does not
    change a sign attack: in eval mode samples are independent, and a positive factor on a sample's loss leaves the sign
    of its gradient (up to rounding). ``attack_weighting="logit"`` does change it. And the released TAIL averages the KL
    over pairs and features before signs and weights are applied, so that neither acts on a pair and it is about
    1 / D of what was meant; ``variant="pairwise"`` is the intended form. There m_c counts as at least 1 in the weights,
    too, where the released form gives a class that was never predicted a weight of 1e5 before rescaling.

    Why a bound: minimising -KL has no minimum. It is on repelled pairs alone, because attracted ones are bounded below,
    and because it is the distant ones that need their gradient. Why 1 nat: in a robust CIFAR-10 network (ResNet-18 of
    width 16, N-FGSM, 300 test images, clean) the KL between features of a pair was 0.03 on average and at most 0.34. So
    the bound leaves ordinary pairs alone, and TAIL cannot fall below -max W.

    The defaults are the released algorithm, by measurement (``benchmarks/reproduce.py reat --scale cpu``: CIFAR-10-LT
    of ratio 0.02, 12 epochs with PGD-3, a ResNet-18 of width 8, 10,000 balanced test images under PGD-20, last epoch,
    three paired seeds). Against ``BalancedSoftmaxAT``, whose loss it nearly is, the released form gained 0.5 points
    (95 %: -0.7 to 1.6), which is no difference that this scale can tell from 0, as the two defects predict. The
    pairwise form with logit weighting lost 1.8 (1.5 to 2.1), and 14 on the tail: at the epoch that
    validation chose that is 1.4 (-1.2 to 4.0) and not decided. One option at a time, last epoch: the pairwise TAIL
    alone lost 1.1 (0.3 to 1.9), and 13 on the tail; both options with ``tail_weight=0.1`` 0.6 (-0.1 to 1.4); logit
    weighting without TAIL 0.5 (0.2 to 0.9). Other coefficients and ``class_eps`` are not measured.

    Call ``epoch_end()`` after each epoch. Over several processes it adds up their counts. The counts of the running
    epoch and the weights are buffers, so the state dict has them.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K) from one last linear layer.
        class_counts: Training images of each class (K,), all at least 1.
        eps: Linf radius in (0, 1].
        alpha: Step size of the attack.
        steps: Steps of the attack.
        start: ``"uniform"``, ``"gaussian"`` or ``"zero"``, as in ``attacks.PGD``.
        variant: ``"released"`` or ``"pairwise"``.
        attack_weighting: ``"loss"`` or ``"logit"``.
        tail_weight: Coefficient of TAIL, at least 0; with 0 no features are needed.
        class_eps: Strength in [0, 1) of RobustLT's radii, larger for rare classes (``attacks.robust_lt_scales``); 0
            gives every class eps.
        attack: An attack on ``model`` that takes a loss instead; eps, alpha, steps, start, class_eps are then unused.
        batchnorm: ``"eval"`` or ``"train"`` during the attack, as in ``Method``.
        twin: Whether to search on a folded twin of the model, as in ``Method``.
        seed: Where the stream of random starts begins.

    Attributes:
        predicted: How many adversarial examples of this epoch, in this process, were predicted as each class (K,).
        class_weights: w (K,), from the previous epoch.

    Raises:
        TypeError: Counts that are not whole numbers.
        ValueError: A number out of range; counts that do not match the model's classes or hold zeros; no tail class,
            or no penultimate features, while tail_weight is not 0; an attack that takes no loss.
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
        variant: str = "released",
        attack_weighting: str = "loss",
        tail_weight: float = 1.0,
        class_eps: float = 0.0,
        attack: Attack | None = None,
        batchnorm: str = "eval",
        twin: bool | str = "auto",
        seed: int = 0,
    ):
        counts = check_class_counts(class_counts)
        attack = long_tail_pgd(model, counts, eps, alpha, steps, start, class_eps) if attack is None else attack
        super().__init__(model, check_takes_loss(attack, "REAT"), batchnorm=batchnorm, twin=twin, seed=seed)
        self.variant = check_name("variant", variant, VARIANTS)
        self.attack_weighting = check_name("attack_weighting", attack_weighting, ATTACK_WEIGHTING)
        self.tail_weight = check_number("tail_weight", tail_weight, at_least=0)
        if self.tail_weight:
            _check_tail(model, counts)
        like = statistics_like(model)
        n = torch.tensor(counts, device=like.device)
        tail = torch.zeros_like(n, dtype=torch.bool)
        tail[torch.tensor(frequency_groups(counts)["tail"], dtype=torch.long)] = True
        self.register_buffer("class_counts", n, persistent=False)
        self.register_buffer("log_counts", n.to(like).log(), persistent=False)
        self.register_buffer("rarity", (n.sum() / n).to(like).sqrt(), persistent=False)
        self.register_buffer("tail", tail, persistent=False)
        self.register_local_buffer("predicted", torch.zeros_like(n))
        self.register_buffer("class_weights", self._weights(n).to(like))

    def attack_loss(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Loss:
        """Return RBL, or with ``attack_weighting="logit"`` cross-entropy on weighted logits."""
        weights = self.class_weights
        if self.attack_weighting == "loss":
            return lambda logits: rebalanced_loss(logits, y, weights)
        return lambda logits: balanced_softmax_loss(logits, y, weights.log())

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Forward the adversarial examples once, count what they were predicted as, and return BSL + TAIL."""
        if self.tail_weight:
            logits, features = logits_and_features(self.model, x_adv)
        else:
            logits, features = self.model(x_adv), None
        loss = balanced_softmax_loss(logits, y, self.log_counts)
        if features is not None:
            tail = tail_loss(features, y, self.rarity, self.tail, variant=self.variant)
            loss = loss + self.tail_weight * tail
        self.predicted.index_add_(0, logits.detach().argmax(1), torch.ones_like(y))  # bincount would read the device
        return Step(loss, logits, x_adv)

    def epoch_end(self) -> None:
        """Turn this epoch's counts, over all processes, into the next epoch's weights, and start counting anew."""
        super().epoch_end()
        add_over_ranks(self.predicted)
        self.class_weights.copy_(self._weights(self.predicted))
        self.predicted.zero_()

    def _weights(self, predicted: Tensor) -> Tensor:
        at_least = 0 if self.variant == "released" else 1
        return effective_number_weights(self.class_counts, predicted.clamp(min=at_least))


def rebalanced_loss(logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return RBL = sum_i w_{y_i} CE_i / sum_i w_{y_i} of logits (B, K), class numbers (B,) and weights (K,)."""
    check_matching(len(weights), logits.shape[-1])
    return F.cross_entropy(logits.to(weights.dtype), y, weight=weights)


def effective_number_weights(class_counts: Tensor, predicted: Tensor) -> Tensor:
    """Return RBL's class weights (K,), which sum to K (REAT; effective numbers after Cui et al. 2019).

    E_c = (1 - beta_c^m_c) / (1 - beta_c) = -n_c expm1(m_c log1p(-1 / n_c));  w_c ~ 1 / (E_c + 1e-5).

    Args:
        class_counts: n (K,), all at least 1.
        predicted: m (K,), at least 0.
    """
    precise = torch.float32 if class_counts.device.type == "mps" else torch.float64
    n, m = class_counts.to(precise), predicted.to(precise)
    exponent = torch.where(m == 0, 0.0, m * torch.log1p(-1 / n))  # beta is 0 for n = 1, and its power 0 is 1
    weights = 1 / (-n * torch.expm1(exponent) + 1e-5)
    return weights * (len(n) / weights.sum())


def tail_loss(features: Tensor, y: Tensor, rarity: Tensor, tail: Tensor, *, variant: str = "pairwise") -> Tensor:
    """Return TAIL, as in ``REAT``; 0 where the batch holds no sample of a tail class.

    Args:
        features: Penultimate features (B, D).
        y: Class numbers (B,).
        rarity: sqrt(N / n) (K,).
        tail: Which classes are tail classes (K,).
        variant: ``"pairwise"`` or ``"released"``.
    """
    with torch.autocast(features.device.type, enabled=False):  # small differences of large sums follow
        divergence = _divergences(features.to(torch.promote_types(features.dtype, torch.float32)))
        anchors = tail[y].to(divergence.dtype)
        same = y[:, None] == y
        weights = (rarity[y][:, None] + rarity[y]).to(divergence.dtype)
        signed = torch.where(same, -weights, weights)
        if variant == "pairwise":
            bounded = torch.where(same, divergence.clamp(max=LARGEST_REPULSION), divergence)
            terms = (signed * bounded).mean(1)
        else:
            terms = divergence.mean(1) / features.shape[1] * signed.mean(1)
        return (anchors * terms).sum() / anchors.sum().clamp(min=1)


def _divergences(features: Tensor) -> Tensor:
    """KL(q_i || p_j) (B, B), with gradient through p alone: rowsum(q log q) - q @ (log p)^T."""
    log_p = features.log_softmax(1)
    centre = log_p.detach().mean(0)  # cancels in the difference, and leaves less to be rounded
    log_q = log_p.detach()
    q = log_q.exp()
    return (q * (log_q - centre)).sum(1, keepdim=True) - q @ (log_p - centre).T


def _check_tail(model: nn.Module, counts: Sequence[int]) -> None:
    """Refuse classes without a tail, and a model whose features cannot be reached or whose classes are others."""
    if not frequency_groups(counts)["tail"]:
        raise ValueError(
            f"{len(counts)} classes have no tail by REAT's rule (places 2 floor(K/3) + 1 to K - 1), so TAIL would "
            "always be 0; use tail_weight=0, or methods.BalancedSoftmaxAT"
        )
    head = classifier_of(model)
    check_matching(len(counts), head.out_features if isinstance(head, nn.Linear) else head.out_channels)
