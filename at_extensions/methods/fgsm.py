"""Single-step adversarial training: FGSM, RS-FGSM and N-FGSM."""

from __future__ import annotations

from torch import nn
from torchattacks.attack import Attack

from at_extensions.attacks import NFGSM, PGD
from at_extensions.checks import check_eps, check_name, check_number
from at_extensions.methods.method import Method
from at_extensions.methods.registry import register

VARIANTS = ("n", "rs", "plain")
"""N-FGSM, RS-FGSM and plain FGSM, from the safest to the one that overfits catastrophically first."""


class FGSMAT(Method):
    """Adversarial training with one gradient step.

    - ``"plain"``: FGSM (Goodfellow et al. 2015): x + eps sign(grad), ``attacks.PGD`` with one step from the image.
    - ``"rs"``: RS-FGSM (Wong et al. 2020, "Fast is better than free"), ``attacks.PGD`` with one step of
      alpha = 1.25 eps from a uniform start in the eps-ball.
    - ``"n"``: N-FGSM (de Jorge et al. 2022), ``attacks.NFGSM``: uniform noise of k eps, step alpha = eps, unprojected.

    Single-step training can fall into catastrophic overfitting: FGSM accuracy rises while PGD accuracy collapses.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K).
        eps: Linf radius in (0, 1].
        alpha: Step size; None means the variant's own. Plain FGSM has none.
        k: Noise radius of N-FGSM in units of eps; None means 2. The other variants have none.
        variant: ``"n"``, ``"rs"`` or ``"plain"``.
        attack: Any torchattacks attack on ``model`` instead; the other attack options are then unused.
        batchnorm: ``"eval"`` or ``"train"`` during the attack, as in ``Method``.
        twin: Whether to search on a folded twin of the model, as in ``Method``.
        seed: Where the stream of random starts begins.

    Raises:
        ValueError: A number out of range, an unknown variant, or a number that the variant does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float = 8 / 255,
        alpha: float | None = None,
        k: float | None = None,
        variant: str = "n",
        attack: Attack | None = None,
        batchnorm: str = "eval",
        twin: bool | str = "auto",
        seed: int = 0,
    ):
        attack = _attack(model, variant, eps, alpha, k) if attack is None else attack
        super().__init__(model, attack, batchnorm=batchnorm, twin=twin, seed=seed)


def _attack(model: nn.Module, variant: str, eps: float, alpha: float | None, k: float | None) -> Attack:
    check_name("variant", variant, VARIANTS)
    check_eps(eps)
    if alpha is not None:
        check_number("alpha", alpha, above=0)
    if variant == "n":
        return NFGSM(model, eps, alpha, 2.0 if k is None else k)
    if k is not None:
        raise ValueError(f"k is N-FGSM's noise radius; variant {variant!r} takes none")
    if variant == "rs":
        return PGD(model, eps, 1.25 * eps if alpha is None else alpha, steps=1)
    if alpha not in (None, eps):
        raise ValueError(f"plain FGSM steps by eps={eps:g}; it takes no alpha")
    return PGD(model, eps, eps, steps=1, start="zero")


@register("fgsm", "FGSM-AT (Goodfellow et al. 2015): one step of eps, no noise; overfits catastrophically")
def fgsm(
    model: nn.Module,
    *,
    eps: float = 8 / 255,
    attack: Attack | None = None,
    batchnorm: str = "eval",
    twin: bool | str = "auto",
    seed: int = 0,
) -> FGSMAT:
    """Build FGSM-AT."""
    return FGSMAT(model, eps=eps, variant="plain", attack=attack, batchnorm=batchnorm, twin=twin, seed=seed)


@register("rs_fgsm", "RS-FGSM (Wong et al. 2020): one step of 1.25 eps from a uniform start, projected")
def rs_fgsm(
    model: nn.Module,
    *,
    eps: float = 8 / 255,
    alpha: float | None = None,
    attack: Attack | None = None,
    batchnorm: str = "eval",
    twin: bool | str = "auto",
    seed: int = 0,
) -> FGSMAT:
    """Build RS-FGSM."""
    return FGSMAT(model, eps=eps, alpha=alpha, variant="rs", attack=attack, batchnorm=batchnorm, twin=twin, seed=seed)


@register("n_fgsm", "N-FGSM (de Jorge et al. 2022): one step of eps from noise of 2 eps, not projected")
def n_fgsm(
    model: nn.Module,
    *,
    eps: float = 8 / 255,
    alpha: float | None = None,
    k: float = 2.0,
    attack: Attack | None = None,
    batchnorm: str = "eval",
    twin: bool | str = "auto",
    seed: int = 0,
) -> FGSMAT:
    """Build N-FGSM."""
    return FGSMAT(
        model, eps=eps, alpha=alpha, k=k, variant="n", attack=attack, batchnorm=batchnorm, twin=twin, seed=seed
    )
