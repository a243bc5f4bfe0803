"""What every room's tests share: tiny models and batches, and proof that a model was left as it was found."""

import contextlib
import random
import sys
import warnings

import numpy as np
import pytest
import sympy  # noqa: F401  # torch imports it at its first trace, and it adds a warning filter
import torch
from hypothesis import HealthCheck, settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)  # tiny tensors, and two workers share two cores
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("suite")

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
PLAIN = (bool, int, float, str, tuple, type(None))


def _copies(tensors):
    return {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors}


def _snapshot(model):
    """Everything about a model and the process that an attack or a measurement must not change."""
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    plain = {n: {k: v for k, v in vars(m).items() if isinstance(v, PLAIN)} for n, m in modules}
    return {
        "modules": {name: id(module) for name, module in modules},
        "parameter objects": {name: id(parameter) for name, parameter in parameters},
        "weights": _copies(parameters),
        "buffers": _copies(model.named_buffers()),
        "gradients": _copies((name, parameter.grad) for name, parameter in parameters),
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters},
        "modes": {name: module.training for name, module in modules},
        "attributes": plain,
        "hooks": {name: [list(vars(module).get(kind, ())) for kind in HOOKS] for name, module in modules},
        "torch's random state": torch.get_rng_state(),
        "NumPy's random state": repr(np.random.get_state()),  # noqa: NPY002
        "Python's random state": random.getstate(),
        "global switches": (
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic, torch.is_autocast_enabled("cpu"),
        ),
        "warning filters": list(warnings.filters),
    }  # fmt: skip


def _same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def _no_tracer(frame, event, argument):
    """A tracer that traces nothing, so that its loss can be noticed."""


@contextlib.contextmanager
def _untouched(model, *, but=(), tracer=True):
    before, outer = _snapshot(model), sys.gettrace()
    if tracer:
        sys.settrace(_no_tracer)
    try:
        yield model
    finally:
        found = sys.gettrace()
        sys.settrace(outer)
        after = _snapshot(model)
        changed = [what for what in before if what not in but and not _same(before[what], after[what])]
        assert not changed, f"left changed: {', '.join(changed)}"
        assert found is (_no_tracer if tracer else outer), "the tracer was taken away"


@pytest.fixture(scope="session")
def untouched():
    """Return a context that fails where its block changes anything but what ``but=("buffers", ...)`` names.

    Compared, also after an exception: weights, buffers, gradients, ``requires_grad``, modes, plain attributes, hooks,
    the random states of torch, NumPy and Python, global switches, warning filters and the tracer.
    """
    return _untouched


_WAITING = tuple(
    getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
)


class _NoHostSync(TorchDispatchMode):
    """Raises where the host would wait for a tensor's values: ``item``, ``bool``, boolean indexing, ``unique``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masks = packet in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if packet in _WAITING or masks:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def no_host_sync():
    """Return a context in which reading a tensor's value on the host raises."""
    return _NoHostSync


def _small_net(seed=0, *, num_classes=3, channels=2, size=5, dtype=torch.float64, train=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(4 * size * size, num_classes),
        )
        for buffer in (net[1].running_mean, net[1].running_var):
            buffer.uniform_(0.5, 1.5)
    return net.to(dtype).train(train)


@pytest.fixture(scope="session")
def small_net():
    """Return a maker: convolution, BatchNorm with history, Tanh, Dropout and a linear layer, in float64."""
    return _small_net


def _linear_net(seed=0, *, num_classes=2, channels=2, size=5, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, num_classes)).to(dtype)


@pytest.fixture(scope="session")
def linear_net():
    """Return a maker: one linear layer on flattened images, in float64, where attacks have a closed form."""
    return _linear_net


def _batch(seed=0, n=4, *, num_classes=3, channels=2, size=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, channels, size, size, generator=generator, dtype=torch.float64)
    images = torch.where(images < 0.15, 0.0, torch.where(images > 0.85, 1.0, images))  # some at the box's corners
    return images.to(dtype), torch.randint(num_classes, (n,), generator=generator)


@pytest.fixture(scope="session")
def batch():
    """Return a maker of images (n, C, H, W) in [0, 1], some pixels being exactly 0 or 1, with labels (n,)."""
    return _batch
