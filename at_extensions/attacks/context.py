"""The context in which attacks run: the model and the global random state come back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from at_extensions.checks import check_name

BATCHNORM = ("eval", "train")
"""How BatchNorm normalises during an attack: by running statistics, or by the batch's own."""


@contextlib.contextmanager
def attacking(model: nn.Module, batchnorm: str = "eval") -> Iterator[nn.Module]:
    """Prepare a model for an attack on it, and undo all of it afterwards, also after an exception.

    Inside, modules are in eval mode and parameters need no gradient, so that an attack computes input gradients
    alone. What is changed and restored: each module's ``training`` flag and each parameter's ``requires_grad``.

    Args:
        model: What is attacked.
        batchnorm: ``"eval"``, or ``"train"`` to normalise by the attacked batch's own statistics; running
            statistics are not updated either way.

    Raises:
        ValueError: Another ``batchnorm``.
    """
    check_name("batchnorm", batchnorm, BATCHNORM)
    modes = [(m, m.training) for m in model.modules()]
    frozen = [p for p in model.parameters() if p.requires_grad]
    untracked: list[nn.Module] = []
    try:
        for module, _ in modes:
            batch_statistics = batchnorm == "train" and isinstance(module, nn.modules.batchnorm._BatchNorm)
            if batch_statistics and module.track_running_stats:
                module.track_running_stats = False
                untracked.append(module)
            module.training = batch_statistics
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield model
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
        for module in untracked:
            module.track_running_stats = True


class RandomStream:
    """A stream of random numbers of its own for code that draws from torch's global generators.

    Inside ``with stream.on(device):`` the global generators of the CPU and of ``device`` continue this stream;
    outside, they are as they were. So attacks that know no generator (all of torchattacks') draw fresh numbers from
    batch to batch and yet leave the global random state alone.

    Args:
        seed: Where the stream starts.
    """

    def __init__(self, seed: int = 0):
        self.seed = int(seed)
        self._states: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Let the global generators of the CPU and of ``device`` continue this stream."""
        devices = {str(d): d for d in (torch.device("cpu"), torch.device(device))}
        before = {name: _get_state(d) for name, d in devices.items()}
        try:
            for name, d in devices.items():
                _set_state(d, self._states[name] if name in self._states else self._start(d))
            yield
        finally:
            for name, d in devices.items():
                self._states[name] = _get_state(d)
                _set_state(d, before[name])

    def _start(self, device: torch.device) -> Tensor:
        return torch.Generator(device).manual_seed(self.seed).get_state()

    def state_dict(self) -> dict:
        """Return where the stream is."""
        return {"seed": self.seed, "states": dict(self._states)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from where another stream was."""
        self.seed, self._states = int(state["seed"]), {k: v.cpu() for k, v in state["states"].items()}


def _get_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def check_attack(attack: Attack, model: nn.Module | None = None) -> Attack:
    """Return ``attack`` if it is a torchattacks attack on ``model`` that sees images in [0, 1].

    Raises:
        TypeError: Not a ``torchattacks.attack.Attack``.
        ValueError: Made for another model, or told to normalise.
    """
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be a torchattacks.attack.Attack, got {type(attack).__name__}")
    if attack.normalization_used is not None:
        raise ValueError(
            f"{attack.attack} was given set_normalization_used; normalisation belongs inside the model: "
            "create_model(..., mean=, std=)"
        )
    if model is not None and attack.model is not model:
        raise ValueError(f"{attack.attack} attacks another model than the one that is trained; make it with that one")
    return attack


@contextlib.contextmanager
def _searching_on(attack: Attack, twin: nn.Module | None) -> Iterator[None]:
    model = attack.model
    if twin is not None:
        attack.model = twin
    try:
        yield
    finally:
        attack.model = model


def perturb(
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    *,
    loss: Callable[[Tensor], Tensor] | None = None,
    stream: RandomStream | None = None,
    batchnorm: str = "eval",
    twin: nn.Module | None = None,
) -> Tensor:
    """Run an attack on a batch and leave nothing behind.

    Args:
        attack: A torchattacks attack; it follows its model to another device.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) class numbers.
        loss: What to maximise, for attacks that take it (``attacks.PGD``, ``attacks.NFGSM``): logits (B, K) to a
            scalar or (B,).
        stream: Where random starts come from; None draws from the global generators.
        batchnorm: As in ``attacking``.
        twin: Computes what the attack's model computes in eval mode (``folding.fold_batchnorm``); searched on instead.

    Returns:
        Adversarial examples (B, C, H, W), detached.
    """
    attack.set_device(images.device)  # of attacks inside this one too
    drawing = stream.on(images.device) if stream else contextlib.nullcontext()
    with _searching_on(attack, twin), attacking(attack.model, batchnorm), drawing:
        adversarial = attack.forward(images, labels) if loss is None else attack.forward(images, labels, loss)
    return adversarial.detach()
