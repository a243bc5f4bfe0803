"""DEAT: the optimiser of diffusion enhanced adversarial training, SGD with a positive and a negative momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _default_to_fused_or_foreach

from at_extensions.checks import check_number

_NEWER, _OLDER = "momentum_newer", "momentum_older"  # h_{t-1} and h_{t-2}; the roles swap at each step


class DEAT(Optimizer):
    r"""Diffusion enhanced adversarial training (arXiv 2306.02618, KDD 2023), as an optimiser for any PyTorch loop.

    The attack and the loss stay as they are; only the outer update changes (Algorithm 2). With g_t the gradient at
    theta_t and h_t = 0 before the first step::

        h_t         = k2 h_{t-2} + (1 - k2) g_t
        theta_{t+1} = theta_t - a' [(1 + k1) h_t - k1 h_{t-1}],    a' = lr / sqrt((1 + k1)^2 + k1^2)

    Even and odd steps keep separate momenta, and each step subtracts the other one's. This is the Positive-Negative
    Momentum of Xie et al. (2021) with beta1 = sqrt(k2) and beta2 = k1.

    Effect, by the paper: PGD-AT follows d theta = -(A + (K + 1/2) a A^2) theta dt + sqrt(a/b) A B dW for learning
    rate a, batch size b and K attack steps; the stationary covariance grows with a/b and a PAC-Bayes bound on the
    robust error shrinks. The derivation assumes a locally quadratic risk, constant Gaussian noise and equal inner and
    outer learning rates. Not in the paper: at a constant rate the displacement telescopes to -a' times the sum of
    all gradients, so the added noise alternates in sign and mostly cancels over many steps, and with the default k1 a
    step is sqrt(5) times shorter than plain SGD's and 22 times shorter than that of SGD with momentum 0.9 at the same
    lr. ``at_extensions.analysis.diffusion`` computes both and the rates at which optimisers match. In our own short
    runs (``benchmarks/reproduce.py deat --scale cpu``) it gained nothing over either, at equal nominal or effective lr.

    Weight decay: the paper does not state the style. Coupled (default) adds ``weight_decay * theta`` to the gradient,
    as ``torch.optim.SGD`` does, so in the long run weights shrink by a' * weight_decay a step; ``decoupled=True``
    multiplies them by 1 - lr * weight_decay before the step, as PNM and AdamW do.

    State: two momenta per parameter, in float32 for bfloat16 and float16 parameters, also through a checkpoint, and in
    the parameter's dtype otherwise. A parameter without a gradient is not changed, not even by weight decay, and its
    recursion continues at its next gradient: the parity of steps is counted per parameter and saved by the roles
    ``momentum_newer`` and ``momentum_older`` in the state. The roles swap at each step, so ``step`` cannot be captured
    in a CUDA graph; it raises.

    Args:
        params: Parameters, named parameters or groups of them; real floating point, with dense gradients.
        lr: Learning rate a, positive; a schedule may take it down to zero later. A float or a tensor with one element.
        k1: Weight of the negative momentum, at least 0. ``k1 = k2 = 0`` is plain SGD.
        k2: Decay of each momentum, in [0, 1).
        weight_decay: Weight decay, at least 0.
        decoupled: Whether weight decay acts on the weights directly instead of through the gradient.
        foreach: Whether to update all tensors in one operation; by default as torch's optimisers: on CUDA, not on CPU.
        maximize: Whether to ascend instead of descend.

    Raises:
        TypeError: An option is not a number, or a parameter is complex or integer.
        ValueError: An option is outside its range.

    Example:
        >>> optimizer = DEAT(model.parameters(), lr=0.1, weight_decay=5e-4)
        >>> scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [100, 105])  # the paper's recipe, 110 epochs
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor,
        k1: float = 1.0,
        k2: float = 0.8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "k1": k1,
            "k2": k2,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            TypeError: An option is not a number, or a parameter is complex or integer.
            ValueError: An option is outside its range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group.update(_checked_options(group), lr=_checked_lr(group["lr"]))
            _check_parameters(group["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: Clears the gradients, evaluates the loss, calls ``backward`` and returns the loss.

        Returns:
            The closure's loss; None without a closure.

        Raises:
            RuntimeError: A gradient is sparse, or a CUDA graph is being captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _check_gradients(self.param_groups)

        for group in self.param_groups:
            for params in _alike([p for p in group["params"] if p.grad is not None]):
                states = [self._state_of(p) for p in params]
                foreach = group["foreach"]
                if foreach is None:
                    foreach = _default_to_fused_or_foreach(params, differentiable=False)[1]
                update = _update_together if foreach else _update_one_by_one
                update(
                    params,
                    [s[_NEWER] for s in states],
                    [s[_OLDER] for s in states],
                    lr=group["lr"],
                    k1=group["k1"],
                    k2=group["k2"],
                    weight_decay=group["weight_decay"],
                    decoupled=group["decoupled"],
                    maximize=group["maximize"],
                )
                for s in states:
                    s[_NEWER], s[_OLDER] = s[_OLDER], s[_NEWER]
        return loss

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        """Return the momenta of a parameter; zeros at its first step."""
        state = self.state[param]
        if not state:
            for name in (_NEWER, _OLDER):
                state[name] = torch.zeros_like(
                    param, dtype=_state_dtype(param), memory_format=torch.preserve_format, requires_grad=False
                )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of ``state_dict``; the next step is bit for bit that of the saved optimiser.

        Raises:
            ValueError: The state is that of another optimiser, or of parameters in other groups or shapes.
        """
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            _check_state_dict(self, state_dict)
            loaded.update(state_dict)

        def keep_precision(_: Optimizer) -> None:
            # torch casts each state to its parameter's dtype, and shares it with ``state_dict`` where that is the same
            for param, state in _by_parameter(self, loaded):
                for name in (_NEWER, _OLDER):
                    self.state[param][name] = state[name].to(param.device, _state_dtype(param), copy=True)

        hooks = [
            self.register_load_state_dict_pre_hook(check),  # last, so that it checks the state that other hooks return
            self.register_load_state_dict_post_hook(keep_precision, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def _update_one_by_one(
    params: list[Tensor],
    newer: list[Tensor],
    older: list[Tensor],
    *,
    lr: float | Tensor,
    k1: float,
    k2: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """Step tensor by tensor; h_t overwrites h_{t-2} in ``older``."""
    norm, lr, step = _step_length(lr, k1)
    for p, h_previous, h in zip(params, newer, older):
        g = -p.grad if maximize else p.grad
        h.lerp_(g.to(h.dtype), 1 - k2)  # h_t = k2 h_{t-2} + (1 - k2) g_t
        if weight_decay and not decoupled:
            h.add_(p, alpha=(1 - k2) * weight_decay)
        if isinstance(step, Tensor) or p.dtype != h.dtype:  # rounds a low-precision parameter once
            move = h.mul(1 + k1).sub_(h_previous, alpha=k1)
            if weight_decay and decoupled:
                move.add_(p, alpha=norm * weight_decay)
            p.sub_(move.mul_(step))
        else:  # the fewest passes over memory
            if weight_decay and decoupled:
                p.mul_(1 - lr * weight_decay)
            p.add_(h, alpha=-step * (1 + k1))
            if k1:
                p.add_(h_previous, alpha=step * k1)


def _update_together(
    params: list[Tensor],
    newer: list[Tensor],
    older: list[Tensor],
    *,
    lr: float | Tensor,
    k1: float,
    k2: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """Step all tensors, which share device and dtype, with one kernel an operation; the same arithmetic."""
    norm, lr, step = _step_length(lr, k1)
    grads = [p.grad.to(h.dtype) for p, h in zip(params, older)]
    torch._foreach_lerp_(older, torch._foreach_neg(grads) if maximize else grads, 1 - k2)
    if weight_decay and not decoupled:
        torch._foreach_add_(older, params, alpha=(1 - k2) * weight_decay)
    if isinstance(step, Tensor) or params[0].dtype != older[0].dtype:
        move = torch._foreach_mul(older, 1 + k1)
        torch._foreach_sub_(move, newer, alpha=k1)
        if weight_decay and decoupled:
            torch._foreach_add_(move, params, alpha=norm * weight_decay)
        torch._foreach_mul_(move, step)
        torch._foreach_sub_(params, move)
    else:
        if weight_decay and decoupled:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, older, alpha=-step * (1 + k1))
        if k1:
            torch._foreach_add_(params, newer, alpha=step * k1)


def _step_length(lr: float | Tensor, k1: float) -> tuple[float, float | Tensor, float | Tensor]:
    """Return sqrt((1 + k1)^2 + k1^2), lr without dimensions, and a', their quotient."""
    norm = math.hypot(1 + k1, k1)
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    return norm, lr, lr / norm


def _state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's momenta: at least float32."""
    return torch.promote_types(param.dtype, torch.float32)


def _alike(params: list[Tensor]) -> list[list[Tensor]]:
    """Group ``params`` by device and dtype."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        lists.setdefault((p.device, p.dtype), []).append(p)
    return list(lists.values())


def _checked_lr(lr: float | Tensor) -> float | Tensor:
    if not isinstance(lr, Tensor):
        return float(check_number("lr", lr, above=0))
    if lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}")
    check_number("lr", float(lr), above=0)
    return lr


def _checked_options(group: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among a group's options as Python's own, which every checkpoint format can hold."""
    bounds = {"k1": {}, "k2": {"below": 1}, "weight_decay": {}}
    return {name: float(check_number(name, group[name], at_least=0, **bound)) for name, bound in bounds.items()}


def _check_parameters(params: list[Tensor]) -> None:
    for p in params:
        if not p.is_floating_point():
            raise TypeError(f"DEAT optimises real floating-point parameters, got {p.dtype} of shape {tuple(p.shape)}")


def _check_gradients(groups: list[dict[str, Any]]) -> None:
    """Refuse unsupported gradients before any parameter changes."""
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if any(g.layout != torch.strided for g in grads):
        raise RuntimeError(
            "DEAT does not support sparse gradients; use dense ones (sparse=False in nn.Embedding) or give these "
            "parameters an optimiser of their own, such as torch.optim.SparseAdam"
        )
    if torch.compiler.is_compiling() or not any(g.is_cuda for g in grads) or not torch.cuda.is_available():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the two momenta of DEAT swap roles at each step, which the replay of a CUDA graph would not do; "
            "leave optimizer.step() out of the graph, or use torch.compile"
        )


def _check_state_dict(optimizer: DEAT, state_dict: dict[str, Any]) -> None:
    """Refuse a state that DEAT did not write for these parameters, before anything changes."""
    foreign = "this is not the state of a DEAT optimiser: "
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(foreign + "it has no 'state' and 'param_groups'")
    needed = {"params", *optimizer.defaults} - {"differentiable"}  # torch adds that default at the first load
    for group in state_dict["param_groups"]:
        missing = sorted(needed - group.keys())
        if missing:
            raise ValueError(foreign + f"a parameter group lacks {', '.join(map(repr, missing))}")
        _checked_options(group)
    sizes = [[len(group["params"]) for group in g] for g in (state_dict["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the state has parameter groups of sizes {sizes[0]}, the optimiser of {sizes[1]}")
    for param, state in _by_parameter(optimizer, state_dict):
        if state.keys() != {_NEWER, _OLDER}:
            raise ValueError(foreign + f"a parameter has {sorted(state)}, not {[_NEWER, _OLDER]}")
        shapes = {tuple(h.shape) for h in state.values()}
        if shapes != {tuple(param.shape)}:
            raise ValueError(f"the state is for a parameter of shape {shapes.pop()}, not {tuple(param.shape)}")


def _by_parameter(optimizer: DEAT, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Pair each parameter with its entry in ``state_dict``, where it has one."""
    numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p, state_dict["state"][n]) for n, p in zip(numbers, params) if n in state_dict["state"]]
