"""PGD adversarial training."""

from __future__ import annotations

from torch import nn
from torchattacks.attack import Attack

from at_extensions.attacks import PGD
from at_extensions.methods.method import Method
from at_extensions.methods.registry import register


@register("pgd", "PGD-AT (Madry et al. 2018): cross-entropy on PGD adversarial examples")
class PGDAT(Method):
    """PGD-AT (Madry et al. 2018, arXiv 1706.06083): min over theta of CE(f(x_adv), y), x_adv from PGD.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K).
        eps: Linf radius in (0, 1].
        alpha: Step size of the attack.
        steps: Steps of the attack.
        start: ``"uniform"``, ``"gaussian"`` or ``"zero"``, as in ``attacks.PGD``.
        attack: Any torchattacks attack on ``model`` instead; eps, alpha, steps and start are then unused.
        batchnorm: ``"eval"`` or ``"train"`` during the attack, as in ``Method``.
        twin: Whether to search on a folded twin of the model, as in ``Method``.
        seed: Where the stream of random starts begins.

    Raises:
        ValueError: A number out of range, or an attack on another model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        start: str = "uniform",
        attack: Attack | None = None,
        batchnorm: str = "eval",
        twin: bool | str = "auto",
        seed: int = 0,
    ):
        attack = PGD(model, eps, alpha, steps, start) if attack is None else attack
        super().__init__(model, attack, batchnorm=batchnorm, twin=twin, seed=seed)
