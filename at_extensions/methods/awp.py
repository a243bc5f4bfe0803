"""AWP: the loss is taken at adversarially perturbed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from at_extensions.checks import check_count, check_number
from at_extensions.methods.method import Method, Step
from at_extensions.methods.pgd import PGDAT
from at_extensions.methods.registry import register
from at_extensions.methods.trades import TRADES
from at_extensions.methods.wrapping import Wrapping
from at_extensions.processes import add_over_ranks, world_size


class AWP(Wrapping):
    """Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884) around any method.

    After the attack, one step of gradient ascent on the inner method's loss L perturbs the weights, layer by layer
    (equation 8),

        v_l = gamma |w_l| grad_{w_l} L / |grad_{w_l} L|,

    and training descends along the gradient of L at w + v. Convolutions and linear layers are perturbed, that is every
    parameter of two dimensions or more; biases and norm layers are not.

    The weights themselves are never written to: the forward pass computes with w + v, whose gradient is the one that
    reaches w. So nothing has to be restored, whatever happens. Buffers see one training pass a step, at w + v; the
    ascent's pass works on copies. Over several processes the ascent follows the gradient of the joint batch. It costs
    a forward and a backward pass more a step.

    Args:
        base: The method inside, such as ``PGDAT`` (the paper's AT-AWP: gamma 0.01) or ``TRADES`` (gamma 0.005).
        gamma: Size of the perturbation relative to a layer's weights, above 0.
        warmup: Epochs without perturbation at the start, at least 0; ``epoch_end()`` counts them.

    Attributes:
        epoch: Number of the running epoch, from 1.

    Raises:
        TypeError: Not a method.
        ValueError: A number out of range.
    """

    def __init__(self, base: Method, gamma: float = 0.005, warmup: int = 0):
        super().__init__(base)
        self.gamma = check_number("gamma", gamma, above=0)
        self.warmup = check_count("warmup", warmup, at_least=0)
        self.epoch = 1
        self._objective = [_Objective(base)]  # in a list: the inner method is a submodule once

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Return the inner method's step at the perturbed weights."""
        if self.epoch <= self.warmup:
            return self.inner.loss(x, x_adv, y, index)
        objective = self._objective[0]
        weights = {
            name: weight for name, weight in objective.named_parameters() if weight.ndim > 1 and weight.requires_grad
        }
        if not weights:
            return self.inner.loss(x, x_adv, y, index)
        perturbation = self._ascend(objective, weights, (x, x_adv, y, index))
        moved = {name: weight + perturbation[name] for name, weight in weights.items()}
        return functional_call(objective, moved, (x, x_adv, y, index))

    def _ascend(self, objective: _Objective, weights: dict[str, nn.Parameter], batch: tuple) -> dict[str, Tensor]:
        """Return v of each weight."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        fixed = {name: p.detach() for name, p in objective.named_parameters() if name not in weights}
        buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
        with torch.enable_grad():
            step = functional_call(objective, {**leaves, **fixed, **buffers}, batch)
            gradients = torch.autograd.grad(step.loss, list(leaves.values()), allow_unused=True)
        moves = {}
        for (name, leaf), gradient in zip(leaves.items(), gradients):
            leaf = leaf.detach()
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            if world_size() > 1:
                gradient = add_over_ranks(gradient.contiguous())
            length = gradient.norm()
            scale = self.gamma * leaf.norm() / length
            moves[name] = gradient * torch.where(length > 0, scale, torch.zeros_like(scale))
        return moves

    def epoch_end(self) -> None:
        """Count the epoch, here and in the inner method."""
        super().epoch_end()
        self.epoch += 1

    def get_extra_state(self) -> dict:
        """Return the random streams' positions and the epoch, for the state dict."""
        return super().get_extra_state() | {"epoch": self.epoch}

    def set_extra_state(self, state: dict) -> None:
        """Continue from a state dict."""
        super().set_extra_state({key: value for key, value in state.items() if key != "epoch"})
        self.epoch = int(state["epoch"])


class _Objective(nn.Module):
    """The inner method's loss as a module's forward, so that it can be computed with other weights."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None) -> Step:
        return self.method.loss(x, x_adv, y, index)


@register("awp", "PGD-AT at adversarially perturbed weights (AT-AWP, Wu et al. 2020)")
def awp(
    model: nn.Module,
    *,
    gamma: float = 0.01,
    awp_warmup: int = 0,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    twin: bool | str = "auto",
    seed: int = 0,
) -> AWP:
    """Build ``AWP(PGDAT(model))``."""
    return AWP(PGDAT(model, eps=eps, alpha=alpha, steps=steps, twin=twin, seed=seed), gamma, awp_warmup)


@register("trades_awp", "TRADES at adversarially perturbed weights (TRADES-AWP, Wu et al. 2020)")
def trades_awp(
    model: nn.Module,
    *,
    beta: float = 6.0,
    gamma: float = 0.005,
    awp_warmup: int = 10,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    twin: bool | str = "auto",
    seed: int = 0,
) -> AWP:
    """Build ``AWP(TRADES(model))``."""
    return AWP(TRADES(model, beta=beta, eps=eps, alpha=alpha, steps=steps, twin=twin, seed=seed), gamma, awp_warmup)
