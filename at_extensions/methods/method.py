"""The contract of every training method, and the register of their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from at_extensions.attacks import Loss, RandomStream, check_attack, perturb
from at_extensions.attacks.context import BATCHNORM
from at_extensions.checks import check_model, check_name, unknown_name
from at_extensions.folding import FoldedTwin, TwinChoice, count_steps, fold_batchnorm, refreshed


class Step(NamedTuple):
    """What a method makes of a batch.

    Attributes:
        loss: Scalar to call ``backward`` on.
        logits: (B, K) of the training forward, on ``x_adv`` unless the method says otherwise.
        x_adv: (B, C, H, W), what the model was trained on.
    """

    loss: Tensor
    logits: Tensor
    x_adv: Tensor


class Method(nn.Module):
    """A training method around a model: ``method(x, y, index)`` attacks, then forwards for the loss.

    It is an ``nn.Module`` that holds the raw model, so ``DistributedDataParallel(method)`` is all that distributed
    training needs. The attack leaves modes, gradients, buffers and global random state as they were; its random
    starts come from a stream of the method's own, which is part of the state dict.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K).
        attack: A torchattacks attack on that very model; None trains on clean images.
        batchnorm: How BatchNorm normalises during the attack: ``"eval"`` (running statistics) or ``"train"`` (the
            batch's own; running statistics are not updated either way).
        twin: Let the attack search on a folded twin of the model (``folding.fold_batchnorm``), refreshed once a step:
            the same logits and input gradients up to rounding, in less time (on a CPU where convolutions have many
            channels, five digits of them in float32). ``"auto"``: for attacks of three gradient steps or more; True:
            always; ``"measure"``: where the first steps show that it is faster (``folding.TwinChoice``); False: never.
            Where nothing folds, where BatchNorm normalises by the batch, or where attacks are nested, the model itself
            is searched on.
        seed: Where the stream of random starts begins.

    Raises:
        TypeError: Not a module, or not a torchattacks attack.
        ValueError: The attack is on another model or normalises.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: Attack | None = None,
        *,
        batchnorm: str = "eval",
        twin: bool | str = "auto",
        seed: int = 0,
    ):
        super().__init__()
        self.model = check_model(model)
        self.attack = None if attack is None else check_attack(attack, model)
        self.batchnorm = check_name("batchnorm", batchnorm, BATCHNORM)
        self.stream = RandomStream(seed)
        self._choice = TwinChoice(twin)
        folds = batchnorm == "eval" and attack is not None and not attack._attacks
        folds = folds and self._choice.may_use(count_steps(attack))
        self._twin: list[FoldedTwin | None] | None = [] if folds else None  # a list: the twin is no submodule
        self._compiled: dict | None = None
        self._local_buffers: list[str] = []

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Attack a batch and return its training loss.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            y: Class numbers (B,).
            index: Which training samples these are (B,), for methods that remember something of each.
        """
        x_adv = self.perturb(x, y, index)
        return self.loss(x, x_adv, y, index)

    def perturb(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the adversarial examples (B, C, H, W) to train on, detached."""
        if self.attack is None:
            return x
        return self.attack_on(x, y)

    def attack_on(self, x: Tensor, y: Tensor, loss: Loss | None = None) -> Tensor:
        """Run the method's attack from its own stream of random starts, on the folded twin where there is one.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            y: Class numbers (B,).
            loss: What to maximise instead of cross-entropy, for attacks that take it: logits to a scalar or (B,).
        """
        with self._choice.turn(x, count_steps(self.attack), self._fresh_twin) as twin:
            return perturb(self.attack, x, y, loss=loss, stream=self.stream, batchnorm=self.batchnorm, twin=twin)

    def _fresh_twin(self) -> FoldedTwin | None:
        """Return the twin with the model's present weights; it is built when it is first needed."""
        if self._twin is None:
            return None
        if not self._twin:
            self._twin.append(fold_batchnorm(self.model))
            if self._twin[0] is not None and self._compiled is not None:
                self._twin[0].compile(**self._compiled)
        if self._twin[0] is not None:
            self._twin[0] = refreshed(self._twin[0])
        return self._twin[0]

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Forward the adversarial examples once and return their cross-entropy."""
        logits = self.model(x_adv)
        return Step(F.cross_entropy(logits, y), logits, x_adv)

    def compile(self, **options) -> None:
        """Compile the model in place, and the twin that attacks search on: two graphs, the attack's and the training's.

        State-dict keys stay as they are.

        Args:
            **options: Of ``torch.compile``, such as ``mode="reduce-overhead"`` for CUDA graphs.
        """
        self.model.compile(**options)
        self._compiled = options
        for twin in self._twin or []:
            if twin is not None:
                twin.compile(**options)

    def register_local_buffer(self, name: str, tensor: Tensor) -> None:
        """Register a buffer that each process fills by itself until ``epoch_end`` merges it.

        ``DistributedDataParallel`` would otherwise overwrite it at every step by that of the first process.
        """
        self.register_buffer(name, tensor)
        self._local_buffers.append(name)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What ``DistributedDataParallel`` leaves alone: the local buffers of this method and of those inside it."""
        methods = [(prefix, m) for prefix, m in self.named_modules() if isinstance(m, Method)]
        return [f"{prefix}.{name}".lstrip(".") for prefix, m in methods for name in m._local_buffers]

    def epoch_end(self) -> None:
        """Turn what was remembered during an epoch into what the next one needs; nothing by default."""

    def get_extra_state(self) -> dict:
        """Return the stream of random starts, and what a measured choice of twins rests on, for the state dict."""
        measured = self._choice.state_dict()
        return self.stream.state_dict() | ({"twin": measured} if measured else {})

    def set_extra_state(self, state: dict) -> None:
        """Go on with a stream of random starts, and a choice of twins, from a state dict."""
        self.stream.load_state_dict(state)
        self._choice.load_state_dict(state.get("twin", {}))


def check_takes_loss(attack: Attack, method: str) -> Attack:
    """Return ``attack`` if its ``forward`` takes a loss, as ``attacks.PGD`` and ``attacks.NFGSM`` do.

    Raises:
        TypeError: Not a torchattacks attack.
        ValueError: It maximises a loss of its own, so that the method's would be ignored.
    """
    if "loss" not in inspect.signature(check_attack(attack).forward).parameters:
        raise ValueError(
            f"{method} attacks with a loss of its own, which {attack.attack} does not take; use attacks.PGD or "
            "attacks.NFGSM"
        )
    return attack


_METHODS: dict[str, tuple[Callable[..., Method], str]] = {}


def register(name: str, description: str) -> Callable:
    """Give a method (a class or a function that makes one) its name on the command line."""

    def decorate(factory: Callable[..., Method]) -> Callable[..., Method]:
        _METHODS[name] = (factory, description)
        return factory

    return decorate


def list_methods() -> dict[str, str]:
    """Return every method's name with a one-line description."""
    return {name: description for name, (_, description) in sorted(_METHODS.items())}


def create_method(name: str, model: nn.Module, *, offered: dict | None = None, **options) -> Method:
    """Build a method by name.

    Args:
        name: From ``list_methods()``.
        model: Classifier of images in [0, 1] that returns logits (B, K).
        offered: Values that are used where the method takes an option of that name and none was given; the others
            are left out (a run offers ``eps``, ``seed`` and ``class_counts`` to every method).
        **options: The method's own, such as ``eps=8/255, alpha=2/255, steps=10``.

    Raises:
        ValueError: Unknown name or option; the nearest ones are named.
    """
    factory = _METHODS[check_name("method", name, _METHODS)][0]
    known = [p for p in inspect.signature(factory).parameters if p != "model"]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of method {name!r}", option, known)
    return factory(model, **{key: value for key, value in (offered or {}).items() if key in known} | options)
