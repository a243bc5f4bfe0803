"""Contexts in which a user's model is run, attacked or traced, and comes back as it was; random streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from at_extensions.checks import check_name

BATCHNORM = ("eval", "train")
"""How BatchNorm normalises during an attack: by running statistics, or by the batch's own."""

_RANKS_APART = 7919  # between the seeds of two processes' streams

_REGISTERS = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def attacking(model: nn.Module, batchnorm: str = "eval") -> Iterator[nn.Module]:
    """Prepare a model for an attack on it, and undo all of it afterwards, also after an exception.

    Inside, modules are in eval mode and parameters need no gradient, so that an attack computes input gradients
    alone. Changed and restored: each module's ``training`` flag and each parameter's ``requires_grad``.

    Args:
        model: The attacked model.
        batchnorm: ``"eval"``, or ``"train"`` to normalise by the attacked batch's own statistics; running
            statistics are not updated either way.

    Raises:
        ValueError: Another ``batchnorm``.
    """
    with frozen(model), torch.enable_grad(), in_attack_mode(model, batchnorm):
        yield model


@contextlib.contextmanager
def in_attack_mode(model: nn.Module, batchnorm: str = "eval") -> Iterator[nn.Module]:
    """Put a model into the modes of ``attacking``, and leave gradients of parameters as they are.

    Args:
        model: The model.
        batchnorm: As in ``attacking``.

    Raises:
        ValueError: Another ``batchnorm``.
    """
    check_name("batchnorm", batchnorm, BATCHNORM)
    modes = [(m, m.training) for m in model.modules()]
    untracked: list[nn.Module] = []
    try:
        for module, _ in modes:
            batch_statistics = batchnorm == "train" and isinstance(module, nn.modules.batchnorm._BatchNorm)
            if batch_statistics and module.track_running_stats:
                module.track_running_stats = False
                untracked.append(module)
            module.training = batch_statistics
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for module in untracked:
            module.track_running_stats = True


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model's forward pass be differentiated twice: without compiled code and without fused attention.

    Both have a first derivative alone in torch. Restored afterwards, also after an exception.

    Args:
        model: The model.
    """
    with uncompiled(model), sdpa_kernel(SDPBackend.MATH):
        yield model


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model's forward pass run without ``torch.compile``, and leave its compiled code for afterwards.

    Args:
        model: The model.
    """
    compiled = [(m, vars(m).pop("_compiled_call_impl")) for m in model.modules() if "_compiled_call_impl" in vars(m)]
    wrapped = any(type(module).__name__ == "OptimizedModule" for module in model.modules())
    stance = getattr(torch.compiler, "set_stance", None) if wrapped else None
    try:
        with contextlib.nullcontext() if stance is None else stance("force_eager"):
            yield model
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


@contextlib.contextmanager
def frozen(model: object) -> Iterator[None]:
    """Let no parameter of a module need a gradient, and restore that; any other callable is left alone."""
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def untouched(model: nn.Module, *, training: bool = False) -> Iterator[nn.Module]:
    """Put a model in eval mode without compilation or gradients, and restore every module's attributes afterwards.

    Restored, also after an exception or Ctrl-C: modes, attributes that a forward pass sets, the tensor under each
    name, the values of buffers, and the global random state. Parameters are not copied: nothing writes to them.

    Args:
        model: The model.
        training: Leave modules in the modes that they are in.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    registers = [{key: dict(saved[key]) for key in _REGISTERS} for saved in attributes]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with random_state_kept(), torch.no_grad():
            for module in modules:
                module.training = training and module.training
                vars(module).pop("_compiled_call_impl", None)  # compiled code knows only the weights it was made with
            yield model
    finally:
        for module, saved, contents in zip(modules, attributes, registers):
            for key, content in contents.items():
                _restore(saved[key], content)
            _restore(vars(module), saved)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _restore(mapping: dict, content: dict) -> None:
    """Make a dict hold ``content`` again; at no moment does it hold less."""
    mapping.update(content)
    for key in mapping.keys() - content.keys():
        del mapping[key]


@contextlib.contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Run without autograd, autocast and inference mode; every global random generator comes back as it was."""
    with (
        random_state_kept(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put every global random generator of torch back as it was."""
    # torch.manual_seed, which AutoAttack calls, seeds the CPU and every device at once
    seed, cpu = torch.initial_seed(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_available():  # not in use yet: the seed that it will start from
            torch.cuda.manual_seed_all(seed)


def reseed(seed: int) -> None:
    """Seed the global generators that are in use; unlike ``torch.manual_seed``, none that a later call would set up."""
    torch.random.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class RandomStream:
    """A stream of random numbers of its own for code that draws from torch's global generators.

    Inside ``with stream.on(device):`` the global generators of the CPU and of ``device`` continue this stream;
    outside, they are as they were. So attacks that know no generator (all of torchattacks') draw fresh numbers from
    batch to batch and yet leave the global random state alone.

    Args:
        seed: Of the first numbers.

    Attributes:
        seed: As given.
        rank: Number of the process whose share of the stream this is (see ``spread``).
    """

    def __init__(self, seed: int = 0):
        self.seed = int(seed)
        self.rank = 0
        self._states: dict[str, Tensor] = {}

    def spread(self, rank: int) -> None:
        """Draw other numbers from here on than the processes of other ranks; the seed and rank 0 stay as they are.

        A second call with the same rank changes nothing.
        """
        if rank == self.rank:
            return
        self.rank = int(rank)
        for name, state in self._states.items():
            generator = torch.Generator(name)
            generator.set_state(state)
            seed = torch.randint(2**62, (), generator=generator, device=name).item()
            self._states[name] = generator.manual_seed(seed + _RANKS_APART * self.rank).get_state()

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
        return torch.Generator(device).manual_seed(self.seed + _RANKS_APART * self.rank).get_state()

    def state_dict(self) -> dict:
        """Return the position of the stream."""
        return {"seed": self.seed, "rank": self.rank, "states": dict(self._states)}

    def load_state_dict(self, state: dict) -> None:
        """Continue from the position of another stream."""
        self.seed, self.rank = int(state["seed"]), int(state["rank"])
        self._states = {name: position.cpu() for name, position in state["states"].items()}


def _get_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
