"""A frozen twin of a model in eval mode, for attacks to search on: BatchNorm folded into convolutions."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from at_extensions.checks import check_model, device_of, is_about_a_view
from at_extensions.folding.attributes import Watch
from at_extensions.folding.backends import accelerate, kernels_enabled
from at_extensions.folding.layers import FoldedNorm, InLayout, is_transformed
from at_extensions.folding.tracing import Trace, foldable_norms, foldable_pairs, is_exactly, is_hooked, trace

_REBUILDS = 3  # refreshes in a row that build the twin anew, after which it is said to keep changing


class TwinWarning(UserWarning):
    """A folded twin, or what is built of one, cannot be used; the model itself is used instead."""


_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: nn.Module, message: str) -> None:
    """Emit a ``TwinWarning`` about a model, unless the same was said of this very module before."""
    said = _warned.setdefault(model, set())
    if message not in said:
        said.add(message)
        warnings.warn(f"{type(model).__name__}: {message}", TwinWarning, stacklevel=3)


def fold_batchnorm(
    model: nn.Module, *, channels_last: bool | None = None, only_folded: bool = True
) -> FoldedTwin | None:
    """Build the folded twin of a model, or return None where no BatchNorm of it can be folded.

    In eval mode BatchNorm is an affine map of each channel, so one that directly follows a convolution vanishes into it
    (Jacob et al. 2018, arXiv 1712.05877, section 3.2):

        w' = gamma / sqrt(var + eps) w,    b' = gamma / sqrt(var + eps) (b - mean) + beta

    A pair is folded only where a trace of the model shows that the convolution's output goes to that BatchNorm and
    nowhere else, that both run once a forward pass, and that nobody hooks, parametrizes or reads them otherwise. The
    model itself is not changed in any way. A model that cannot be copied or traced has no twin, and a ``TwinWarning``
    says why, once for each model; one in which nothing folds has none either, and that is no failure.

    Args:
        model: Any classifier; in train or in eval mode, which stays as it is.
        channels_last: Whether the twin computes in channels_last. None: on a CPU, where it is the faster layout, and
            wherever the model's own weights are in it.
        only_folded: False returns a twin also of a model without such a BatchNorm, if it has several convolutions:
            one that runs in channels_last.

    Returns:
        The twin, up to date with the model's present weights, or None.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``AT_EXTENSIONS_KERNELS`` is neither 0 nor 1.
    """
    check_model(model)
    kernels_enabled()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    norms = any(isinstance(module, foldable_norms()) for module in model.modules())
    if not norms and (only_folded or convolutions < 2):
        return None
    try:
        twin = FoldedTwin(model, channels_last=channels_last)
    except Exception as error:  # whatever a foreign model's copy or trace may raise: it then runs as it is
        warn_once(model, f"no folded twin, attacks search on the model itself: {type(error).__name__}: {error}")
        return None
    return twin if twin.folded or not (only_folded or convolutions < 2) else None


def refreshed(twin: FoldedTwin) -> FoldedTwin | None:
    """Refresh a twin and return it, or None, with a ``TwinWarning`` that gives the reason, if it is of no more use."""
    model = twin.model
    try:
        twin.refresh()
    except Exception as error:  # as when a twin is built
        warn_once(model, f"the folded twin cannot follow a change of the model: {type(error).__name__}: {error}")
        return None
    if twin.keeps_changing:
        warn_once(
            model,
            "attributes, hooks or globals that its forward pass reads change at every step, so that a folded twin "
            "costs more than it saves; attacks search on the model itself",
        )
        return None
    return twin


class FoldedTwin(nn.Module):
    """What ``fold_batchnorm`` returns: maps images to the logits, and input gradients, of the model in eval mode.

    Call ``refresh()`` after anything of the model changed: once a training step, under the autocast of the attack. Its
    cost is one multiplication of the weights by their scales, and a comparison of the modules' attributes; no device is
    synchronised. Under autocast the weights are kept in its dtype, so that the attack's passes cast none, and the twin
    then runs under that autocast wherever it is called. On a CPU, some layers take the faster ways of
    ``folding.backends``, unless the environment says ``AT_EXTENSIONS_KERNELS=0`` when the twin is built.

    Weights that need neither folding nor another dtype or layout are shared with the model. Hooks are shared too: those
    of modules that were not folded fire as they do in the model. Where ``refresh()`` notices that attributes, classes,
    methods or globals read by the forward passes have changed, it takes them over or builds the twin anew
    (``folding.attributes``). Keep a twin out of other modules' attributes (in a list, say): its parameters, which
    require no gradient, would enter their state dict. It is always in eval mode. A twin in channels_last whose model
    flattens its maps by ``view`` leaves that layout when it is first called.

    Attributes:
        network: The model's copy that runs.
        folded: How many BatchNorms were folded.
        autocast: The dtype of the autocast that it was last refreshed under, or None.
        channels_last: Whether it computes in that layout.
        keeps_changing: Whether the last refreshes all had to build it anew, which costs more than a twin saves.
    """

    def __init__(self, model: nn.Module, *, channels_last: bool | None = None):
        super().__init__()
        self._model = [model]  # in a list: a reference, not a submodule
        self._channels_last = channels_last
        self.autocast: torch.dtype | None = None
        self._rebuilds = 0
        self._build()
        self.refresh()

    @property
    def folded(self) -> int:
        """How many BatchNorms vanished into a convolution."""
        return len(self._folds)

    @property
    def model(self) -> nn.Module:
        """The model that the twin was built of."""
        return self._model[0]

    @property
    def device(self) -> torch.device:
        """Where the model is, and the twin since it was last refreshed."""
        return device_of(self._model[0])

    @property
    def channels_last(self) -> bool:
        """Whether the twin computes in channels_last."""
        return self._layout is torch.channels_last

    @property
    def keeps_changing(self) -> bool:
        """Whether the last refreshes all had to build the twin anew."""
        return self._rebuilds > _REBUILDS

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images (B, C, H, W) that the model would return in eval mode."""
        if self._layout is not torch.channels_last or torch.compiler.is_compiling():
            return self._run(x)
        try:
            return self._run(x)
        except RuntimeError as error:
            if not is_about_a_view(error):
                raise
            self._leave_channels_last()
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        last = torch.channels_last
        if self._layout is last and x.ndim == 4 and not is_transformed() and not x.is_contiguous(memory_format=last):
            x = InLayout.apply(x, last)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.network(x)

    def _leave_channels_last(self) -> None:
        """Compute in the model's own layout from now on: it flattens its maps by ``view``, which takes no other."""
        self._channels_last = False
        self._own.clear()  # whose memory is in the other layout
        with torch.autocast(device_of(self._model[0]).type, dtype=self.autocast, enabled=self.autocast is not None):
            self.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> FoldedTwin:
        """Take over the model's present weights, statistics, attributes and device; return the twin itself.

        Raises:
            Exception: The model changed into one that cannot be copied or traced.
        """
        if self._is_stale():
            self._rebuilds += 1
            self._build()
        else:
            self._rebuilds = 0
        device = device_of(self._model[0])
        self.autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        self._layout = torch.channels_last if self._wants_channels_last(device) else torch.preserve_format
        with torch.autocast(device.type, enabled=False):
            for shared in self._shared:
                self._share(shared)
            for fold in self._folds:
                self._fold(fold)
        for layer in self._accelerated:
            layer.forget()
        return self

    def train(self, mode: bool = True) -> FoldedTwin:
        """Stay in eval mode."""
        return super().train(False)

    def extra_repr(self) -> str:
        """Say how many BatchNorms were folded."""
        return f"folded={self.folded}"

    @torch.inference_mode(False)
    def _build(self) -> None:
        model = self._model[0]
        network = _copy_sharing_tensors(model).eval()
        live = dict(zip(network.modules(), model.modules(), strict=True))
        live_of = [(original, copied) for copied, original in live.items()]
        traced = trace(network)
        pairs = foldable_pairs(network, traced)
        for conv, norm in pairs:
            norm.__class__ = FoldedNorm  # by class, not by a new module: other holders of the norm see it too
            conv.weight, conv.bias = (nn.Parameter(torch.empty(0), requires_grad=False) for _ in range(2))
        self.network = network
        self._own: set[nn.Parameter] = set()  # those whose memory is not the model's
        self._seen = _structure(model)
        self._folds = [_Fold(live[conv], live[norm], conv, traced.lowers(conv)) for conv, norm in pairs]
        folded = {conv for conv, _ in pairs}
        lowered = _lowered(network, traced)
        self._shared = [
            _Shared(live[module], module, module in lowered)
            for module in network.modules()
            if module not in folded and (module._parameters or module._buffers)
        ]
        self._accelerated = accelerate(network)
        self._watch = Watch(live_of)

    def _is_stale(self) -> bool:
        """Whether the model is another than the twin was built of, in more than can be taken over."""
        now = _structure(self._model[0])
        same = len(now) == len(self._seen) and all(
            a is b and names == seen for (a, *names), (b, *seen) in zip(now, self._seen, strict=True)
        )
        return not (same and self._watch.follow())

    def _wants_channels_last(self, device: torch.device) -> bool:
        if self._channels_last is not None:
            return self._channels_last
        return device.type == "cpu" or any(
            w.ndim == 4 and not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last)
            for w in self._model[0].parameters()
        )

    def _share(self, shared: _Shared) -> None:
        live, twin, lowers = shared
        for name, buffer in live._buffers.items():
            twin._buffers[name] = buffer
        for name, parameter in live._parameters.items():
            if parameter is not None:
                self._place(twin._parameters[name], parameter.detach(), lowers)

    def _dtype(self, value: Tensor, lowers: bool) -> torch.dtype:
        """Return the dtype that autocast would compute in; it leaves float64 alone."""
        return self.autocast if lowers and self.autocast and value.dtype is not torch.float64 else value.dtype

    def _place(self, held: nn.Parameter, value: Tensor, lowers: bool) -> None:
        """Share a value's memory, or write it into memory of the twin's own where dtype or layout differ."""
        dtype = self._dtype(value, lowers)
        layout = self._layout if value.ndim == 4 else torch.preserve_format
        if dtype == value.dtype and (layout is torch.preserve_format or value.is_contiguous(memory_format=layout)):
            held.data = value
            self._own.discard(held)
        else:
            self._memory(held, value, dtype, layout).copy_(value)

    def _memory(self, held: nn.Parameter, like: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        """Return the memory of the twin's own that a parameter has; made anew when it does not fit."""
        fits = held in self._own and (held.dtype, held.device, held.shape) == (dtype, like.device, like.shape)
        if not fits or (layout is torch.channels_last and not held.is_contiguous(memory_format=layout)):
            held.data = torch.empty_like(like, dtype=dtype, memory_format=layout)
            self._own.add(held)
        return held.detach()  # not .data: a graph that holds the old weights then says so, as torch does

    def _fold(self, fold: _Fold) -> None:
        conv, norm, twin, lowers = fold
        dtype = self._dtype(conv.weight, lowers)
        mean, variance = _precise(norm.running_mean), _precise(norm.running_var)
        scale = torch.rsqrt(variance + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = mean if conv.bias is None else mean - conv.bias
        bias = -shift * scale if norm.bias is None else torch.addcmul(_precise(norm.bias), shift, scale, value=-1)
        weight = self._memory(twin.weight, conv.weight, dtype, self._layout)
        torch.mul(conv.weight, scale.view(-1, 1, 1, 1), out=weight)
        self._memory(twin.bias, bias, dtype, torch.preserve_format).copy_(bias)


def _precise(tensor: Tensor) -> Tensor:
    """Return it in float32 at least: what is computed of bfloat16 is rounded once, as BatchNorm does itself."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Fold(NamedTuple):
    """A convolution and the BatchNorm after it in the model, and the twin's convolution that computes both.

    ``lowers``: autocast computes it in its own dtype.
    """

    conv: nn.Module
    norm: nn.Module
    twin: nn.Module
    lowers: bool


class _Shared(NamedTuple):
    """Another module of the model and its copy; ``lowers`` as above."""

    live: nn.Module
    twin: nn.Module
    lowers: bool


_LOWERED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _structure(model: nn.Module) -> list[tuple]:
    """Return every module with what a twin is built of: whether it is hooked, and the names of its tensors."""

    def names(module: nn.Module) -> list[str]:
        return [name for held in (module._parameters, module._buffers) for name, t in held.items() if t is not None]

    return [(module, is_hooked(module), *names(module)) for module in model.modules()]


def _lowered(network: nn.Module, traced: Trace) -> set[nn.Module]:
    """Return the modules whose weights can be kept in autocast's dtype: all that hold the same tensor, or none."""

    def held(modules: set[nn.Module]) -> set[nn.Parameter]:
        return {p for module in modules for p in module._parameters.values() if p is not None}

    lowered = {module for module in network.modules() if is_exactly(module, _LOWERED) and traced.lowers(module)}
    others = set(network.modules()) - lowered
    while others:
        kept = held(others)
        others = {module for module in lowered if held({module}) & kept}
        lowered -= others
    return lowered


def _copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """Copy a model's modules; its hooks and the memory of its parameters stay shared, its buffers are cloned."""
    memo: dict[int, object] = {}
    modules = set(model.modules())
    for module in modules:
        for name, value in vars(module).items():
            if "_hooks" in name:
                memo[id(value)] = value
            elif name not in ("_parameters", "_buffers", "_modules"):
                for part in _parts(value):
                    if isinstance(part, Tensor):
                        memo[id(part)] = part.detach()
                    elif isinstance(part, nn.Module) and part not in modules:
                        memo[id(part)] = part  # not registered, so the model's own: nothing else follows its weights
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()  # a trace may write into one; refresh() shares them
    return copy.deepcopy(model, memo)


def _parts(value: object, depth: int = 3) -> Iterator[object]:
    """Yield a value and what its containers hold."""
    yield value
    if depth and isinstance(value, (list, tuple, set, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part, depth - 1)
