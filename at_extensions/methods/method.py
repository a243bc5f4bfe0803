"""The contract of every training method."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchattacks.attack import Attack

from at_extensions import attacks
from at_extensions.attacks import Loss, RandomStream, attacking, check_attack, first_pass, perturb
from at_extensions.checks import check_logits, check_model, check_name, check_range
from at_extensions.folding import FoldedTwin, TwinChoice, count_steps, fold_batchnorm, refreshed
from at_extensions.methods._guard import BatchGuard, check_kinds
from at_extensions.untouched import BATCHNORM


class Step(NamedTuple):
    """A method's result for one batch.

    Attributes:
        loss: Scalar to call ``backward`` on.
        logits: (B, K) of the training forward, on ``x_adv`` unless the method says otherwise.
        x_adv: (B, C, H, W), the images that the model was trained on.
        terms: Named parts of the loss, detached scalars, which ``Trainer`` logs as ``train_<name>``.
        clean_logits: (B, K) of the clean images in the training forward, with gradient, for methods that forward them.
    """

    loss: Tensor
    logits: Tensor
    x_adv: Tensor
    terms: Mapping[str, Tensor] = MappingProxyType({})
    clean_logits: Tensor | None = None

    def plus(self, name: str, term: Tensor) -> Step:
        """Return this step with a term (a scalar) added to its loss, and logged under ``name``."""
        return self._replace(loss=self.loss + term, terms={**self.terms, name: term.detach()})


class Method(nn.Module):
    """A training method around a model: ``method(x, y, index)`` attacks, then forwards for the loss.

    It is an ``nn.Module`` that holds the raw model, so ``DistributedDataParallel(method)`` is all that distributed
    training needs. The attack leaves modes, gradients, buffers and global random state as they were; its random
    starts come from a stream of the method's own, which is part of the state dict.

    A method of your own overrides some of ``attack_loss(x, y, index)``, ``perturb(x, y, index, loss=)`` and
    ``loss(x, x_adv, y, index)``, and not ``forward``: then any ``Wrapping`` fits around it.

    The first batch is checked in full. Later ones are checked by flags that stay on the device: a batch with images or
    labels out of range, or with NaN, adds nothing to the loss (its images are clamped, so that BatchNorm's buffers stay
    finite) and raises at ``check()``, which ``epoch_end()`` and every 200th step call. Labels of any integer dtype are
    converted to int64.

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
        seed: Of the stream of random starts.

    Attributes:
        needs_index: Whether the method cannot do without ``index``.
        keep_first_pass: Whether each attack's first pass is recorded in ``first_pass``; False at first.
        first_pass: Of the last attack (``attacks.FirstPass``), or None.

    Raises:
        TypeError: Not a module, or not a torchattacks attack.
        ValueError: The attack is on another model or normalises; a ``DistributedDataParallel`` for a model.
    """

    needs_index = False

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
        self._prepare()
        self.model = _check_raw(model)
        self.attack = None if attack is None else check_attack(attack, model)
        if attack is not None:
            self._guard.limits = attacks.range_of(attack)
        self.batchnorm = check_name("batchnorm", batchnorm, BATCHNORM)
        self.stream = RandomStream(seed)
        self.keep_first_pass, self.first_pass = False, None
        self._choice = TwinChoice(twin)
        folds = batchnorm == "eval" and attack is not None and not attack._attacks
        folds = folds and self._choice.may_use(count_steps(attack))
        self._twin: list[FoldedTwin | None] | None = [] if folds else None  # a list: the twin is no submodule
        self._compiled: dict | None = None
        self._step: dict | None = None

    def _prepare(self) -> None:
        """Set up the state that every method has for itself, a ``Wrapping`` too."""
        self._local_buffers: list[str] = []
        self._guard = BatchGuard()

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Step:
        """Attack a batch and return its training loss.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            y: Class numbers (B,), of any integer dtype.
            index: Numbers of the training samples (B,), for methods that remember something of each.

        Raises:
            TypeError, ValueError: A batch that cannot be right, as far as that is seen without reading the device; in
                the first batch, all of it.
        """
        y = self._labels(x, y, index)
        spoiled = None
        if self.num_classes is None:
            self._guard.first(self.model, x, y)
        else:
            x, y, spoiled = self._guard.later(x, y)
        with self._one_step():
            x_adv = self.perturb(x, y, index)
            step = self.loss(x, x_adv, y, index)
        check_logits(step.logits, len(x), self.num_classes, mode="train" if self.model.training else "eval")
        if spoiled is None:
            return step
        return step._replace(loss=torch.where(spoiled, torch.zeros_like(step.loss), step.loss))

    def inspect(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> None:
        """Check a batch in full, as the first step does; ``num_classes`` is known afterwards.

        Raises:
            TypeError, ValueError: Images, labels, logits or index that cannot be right.
        """
        self._guard.first(self.model, x, self._labels(x, y, index))

    def check(self) -> None:
        """Raise if a batch since the last call could not be right; this reads the device.

        Raises:
            ValueError: It names the faults.
        """
        self._guard.check()

    def faults(self) -> list[str]:
        """Return the faults of batches since the last call, and forget them; this reads the device."""
        return self._guard.faults()

    def flag(self, fault: str, condition: Tensor) -> None:
        """Note on the device a fault of a batch, which ``check()`` reports: a bool that is true where it happened."""
        self._guard.flag(fault, condition)

    @property
    def num_classes(self) -> int | None:
        """Number of logits K; None before the first batch."""
        return self._guard.num_classes

    @property
    def image_range(self) -> tuple[float, float]:
        """Range of the images: that of the attack, [0, 1] unless set otherwise.

        Setting it sets the attack's, as for a split whose images have a range of their own: ``split.image_range``.

        Raises:
            TypeError: Not two numbers.
            ValueError: Not in order, or the attack clips images to [0, 1] whatever they are, as torchattacks' own do.
        """
        return self._guard.limits

    @image_range.setter
    def image_range(self, limits: tuple[float, float]) -> None:
        limits = check_range(limits)
        if self.attack is not None:
            attacks.set_range(self.attack, limits)
        self._guard.limits = limits

    def perturb(self, x: Tensor, y: Tensor, index: Tensor | None = None, *, loss: Loss | None = None) -> Tensor:
        """Return the adversarial examples (B, C, H, W) to train on, detached.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            y: Class numbers (B,).
            index: Numbers of the training samples (B,).
            loss: Maximised instead of ``attack_loss``; a ``Wrapping`` gives it.
        """
        if self.attack is None:
            return x
        return self.attack_on(x, y, self.attack_loss(x, y, index) if loss is None else loss)

    def attack_loss(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Loss | None:
        """Return the loss of logits (B, K) that the attack maximises on a batch; None leaves it to the attack.

        It is called once a batch, before the attack. None means cross-entropy in ``attacks.PGD`` and
        ``attacks.NFGSM``, and the attack's own loss in torchattacks' attacks.
        """
        return None

    def clean_logits(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images in eval mode, without gradient and without a trace in the model.

        Within one step they are computed once, though a method and its wrappings ask for them.
        """
        if self._step is not None and self._step.get("images") is x:
            return self._step["logits"]
        searched = self._step_twin() or self.model
        with attacking(self.model, self.batchnorm), torch.no_grad():
            logits = searched(x)
        if self._step is not None:
            self._step.update(images=x, logits=logits)
        return logits

    @contextlib.contextmanager
    def _one_step(self) -> Iterator[None]:
        """Keep the refreshed twin and the clean logits until the outermost such block ends."""
        if self._step is not None:
            yield
            return
        self._step = {}
        try:
            yield
        finally:
            self._step = None

    def _step_twin(self) -> FoldedTwin | None:
        """Return the twin, refreshed once a step: in the middle of an attack a refresh would spoil its graph."""
        if self._step is None:
            return self._fresh_twin()
        if "twin" not in self._step:
            self._step["twin"] = self._fresh_twin()
        return self._step["twin"]

    def _labels(self, x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
        return check_kinds(x, y, index, needs_index=type(self).__name__ if self.needs_index else None)

    def attack_on(self, x: Tensor, y: Tensor, loss: Loss | None = None) -> Tensor:
        """Run the method's attack from its own stream of random starts, on the folded twin where there is one.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            y: Class numbers (B,).
            loss: Loss to maximise instead of cross-entropy, for attacks that take one: logits to a scalar or (B,).
        """
        attacks.set_range(self.attack, self.image_range)  # the attack may have been exchanged
        recorded = first_pass(self.attack) if self.keep_first_pass else contextlib.nullcontext()
        turn = self._choice.turn(x, count_steps(self.attack), self._step_twin)
        with self._one_step(), recorded as self.first_pass, turn as twin:
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
        """Names that ``DistributedDataParallel`` ignores: local buffers of this method and of the ones inside it."""
        methods = [(prefix, m) for prefix, m in self.named_modules() if isinstance(m, Method)]
        return [f"{prefix}.{name}".lstrip(".") for prefix, m in methods for name in m._local_buffers]

    def epoch_end(self) -> None:
        """Prepare the next epoch from the memory of this one, and raise if a batch could not be right.

        Overriding methods call it too. Under several processes each calls it.
        """
        self.check()

    def memory(self) -> dict[str, Any]:
        """Return the part of the state dict that is not the model's, which a checkpoint keeps beside the model."""
        inside = {id(module) for module in self.model.modules()}
        named = self.named_modules(remove_duplicate=False)
        prefixes = tuple(f"{name}." for name, module in named if id(module) in inside)
        return {key: value for key, value in self.state_dict().items() if not key.startswith(prefixes)}

    def load_memory(self, memory: dict[str, Any]) -> None:
        """Go on from the memory of another method of this kind; the model stays as it is.

        Raises:
            ValueError: It has other entries or shapes; nothing was loaded then.
        """
        own = self.memory()
        missing, unknown = sorted(own.keys() - memory.keys()), sorted(memory.keys() - own.keys())
        both = own.keys() & memory.keys()
        shapes = sorted(key for key in both if _shape(own[key]) != _shape(memory[key]))
        if missing or unknown or shapes:
            differing = f"missing {missing}, unknown {unknown}, of other shapes {shapes}"
            raise ValueError(f"this method remembers other things: {differing}")
        self.load_state_dict(memory, strict=False)

    def streams(self) -> dict[str, RandomStream]:
        """Return every random stream of this method and of the modules inside it, by name."""
        return {
            f"{prefix}.{name}".lstrip("."): value
            for prefix, module in self.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, RandomStream)
        }

    def get_extra_state(self) -> dict:
        """Return the positions of this method's own random streams and a measured choice of twins."""
        measured = self._choice.state_dict() if "_choice" in vars(self) else {}
        streams = {name: value.state_dict() for name, value in vars(self).items() if isinstance(value, RandomStream)}
        return streams | ({"twin": measured} if measured else {})

    def set_extra_state(self, state: dict) -> None:
        """Go on with the random streams of a state dict.

        Raises:
            ValueError: It has other streams.
        """
        state = dict(state)
        measured = state.pop("twin", {})
        own = {name: value for name, value in vars(self).items() if isinstance(value, RandomStream)}
        if own.keys() != state.keys():
            raise ValueError(f"{type(self).__name__} has the streams {sorted(own)}, the state dict {sorted(state)}")
        for name, stream in own.items():
            stream.load_state_dict(state[name])
        if "_choice" in vars(self):
            self._choice.load_state_dict(measured)


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _check_raw(model: nn.Module) -> nn.Module:
    if isinstance(check_model(model), DistributedDataParallel):
        raise ValueError(
            "give the method the raw model and wrap the method: DistributedDataParallel(PGDAT(model)); attacks must "
            "not meet the wrapper"
        )
    return model


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
