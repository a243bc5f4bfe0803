"""The model that attacks search on in place of the one given: the same logits, up to rounding, in less time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from at_extensions.folding import FoldedTwin, fold_batchnorm, warn_once


def search_model(
    model: Callable[[Tensor], Tensor], x: Tensor, precision: str = "fp32", *, compiled: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return what to search on in place of a model in eval mode, or the model itself where nothing is faster.

    BatchNorm is folded into the convolutions before it, convolutions run in channels_last and, on a CPU, in the ways of
    ``folding.backends``, provided that the logits of ``x`` come out the same; a ``TwinWarning`` says if they do not.
    Images stay contiguous: AutoAttack views their gradients.

    Args:
        model: The model as given; anything but a module in eval mode is returned as it is, but for ``precision``.
        x: Images (B, C, H, W) to compare logits on.
        precision: ``"bf16"`` searches under autocast.
        compiled: Compile it with ``torch.compile``.
    """
    search = _twin(model, x) or model
    if precision == "bf16":
        search = _LowPrecision(search, x.device.type)
    return torch.compile(search, dynamic=True) if compiled else search


def twin_in(search: Callable[[Tensor], Tensor]) -> FoldedTwin | None:
    """Return the twin that ``search_model`` made, or None."""
    if isinstance(search, _LowPrecision):
        (search,) = search._model
    return search if isinstance(search, FoldedTwin) else None


def _twin(model: Callable[[Tensor], Tensor], x: Tensor, tolerance: float = 1e-3) -> nn.Module | None:
    """Return the model's twin, folded and in channels_last, if there is one and it agrees."""
    if not isinstance(model, nn.Module) or any(module.training for module in model.modules()):
        return None
    twin = fold_batchnorm(model, channels_last=True, only_folded=False)
    if twin is None:
        return None
    logits = model(x)
    try:
        folded = twin(x)
    except Exception as error:  # whatever a foreign model raises when it is computed otherwise
        warn_once(model, f"no folded twin, attacks search on the model itself: {type(error).__name__}: {error}")
        return None
    if folded.shape == logits.shape and close(folded, logits, tolerance):
        return twin
    warn_once(
        model,
        "no folded twin, attacks search on the model itself: the twin's logits differ from the model's by more than "
        f"{tolerance:g} of their spread",
    )
    return None


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two models' logits agree, to a share of their spread."""
    return bool((a - b).abs().max() <= tolerance * b.std().clamp_min(1e-12))


class _LowPrecision(nn.Module):
    """A model under bf16 autocast, with logits in float32."""

    def __init__(self, model: Callable[[Tensor], Tensor], device_type: str):
        super().__init__()
        self._model = [model]  # in a list: a reference, not a submodule
        self.device_type = device_type
        if hasattr(model, "refresh"):  # a twin keeps its weights in the precision that it is refreshed under
            with torch.autocast(device_type, torch.bfloat16):
                model.refresh()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            return self._model[0](x).float()
