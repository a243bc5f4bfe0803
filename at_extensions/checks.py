"""Validation of users' arguments: each check raises one clear error with the way out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from numbers import Integral, Real

import torch
from torch import Tensor, nn

ONE_HOT = "one-hot labels are not supported; use labels.argmax(1)"

NORMS = ("Linf", "L2", "L1")
"""Threat models, as AutoAttack and RobustBench spell them."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not in ``known``; it names the nearest ones.

    Args:
        kind: Kind of the thing that is named, such as ``"model"``.
        name: The name that the user wrote.
        known: Every name that would have been right.
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if not close:  # a case-insensitive second look: "PreActResNet18" is meant as "preact_resnet18"
        folded = {k.lower().replace("_", "").replace("-", ""): k for k in known}
        wanted = str(name).lower().replace("_", "").replace("-", "")
        close = [folded[c] for c in difflib.get_close_matches(wanted, folded, n=3, cutoff=0.5)]
    if close:
        hint = "did you mean " + " or ".join(repr(c) for c in close) + "?"
    else:
        hint = "known: " + (", ".join(known[:20]) or "none") + (", ..." if len(known) > 20 else "")
    return ValueError(f"unknown {kind} {name!r}; {hint}")


def check_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return ``name`` if it is in ``known``.

    Raises:
        ValueError: It is not; the message names the nearest ones.
    """
    known = list(known)
    if name not in known:
        raise unknown_name(kind, name, known)
    return name


def check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return ``value`` if it is a finite number within the bounds that are given.

    Raises:
        TypeError: It is not a number.
        ValueError: It is outside the bounds or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    left = "(-inf" if above is None and at_least is None else f"({above:g}" if above is not None else f"[{at_least:g}"
    right = "inf)" if below is None and at_most is None else f"{below:g})" if below is not None else f"{at_most:g}]"
    fits = (
        math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if not fits:
        raise ValueError(f"{name} must lie in {left}, {right}, got {value!r}")
    return value if isinstance(value, (int, float)) else float(value)


def check_count(name: str, value: int, *, at_least: int = 1) -> int:
    """Return ``value`` if it is a whole number of at least ``at_least``.

    Raises:
        TypeError: It is not a whole number.
        ValueError: It is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def check_range(limits: Sequence[float], *, name: str = "image_range") -> tuple[float, float]:
    """Return the range of images as a tuple, if it is two finite numbers, the lower one first.

    Raises:
        TypeError: Not two numbers.
        ValueError: Not in order, or not finite.
    """
    if not isinstance(limits, (tuple, list)) or len(limits) != 2:
        raise TypeError(f"{name} must be (low, high), such as (0.0, 1.0), got {limits!r}")
    low = check_number(f"the lower end of {name}", limits[0])
    return float(low), float(check_number(f"the upper end of {name}", limits[1], above=low))


def check_norm(norm: str) -> str:
    """Return ``norm`` if it is one of ``NORMS``.

    Raises:
        ValueError: It is not.
    """
    return check_name("norm", norm, NORMS)


def check_eps(eps: float, norm: str = "Linf", *, name: str = "eps") -> float:
    """Return the attack radius ``eps`` if images in [0, 1] can be attacked with it.

    Args:
        eps: Radius: in (0, 1] for Linf, any positive number for L2 and L1.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        name: How the error calls it.

    Raises:
        TypeError: It is not a number.
        ValueError: It is outside the range.
    """
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"{name} must be a number such as 8/255, got {eps!r}")
    eps = float(eps)
    if norm == "Linf":
        if not 0 < eps <= 1:
            hint = f"; did you mean {eps:g}/255?" if math.isfinite(eps) and 1 < eps <= 255 else ""
            raise ValueError(f"{name} must lie in (0, 1] for images in [0, 1], got {eps:g}{hint}")
    elif not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"{name} must be a positive number, got {eps:g}")
    return eps


def parse_fraction(text: str | float) -> float:
    """Return the number that ``"8/255"``, ``"0.5"`` or a plain number stands for.

    Raises:
        ValueError: The text is no number or fraction.
    """
    if isinstance(text, Real) and not isinstance(text, bool):
        return float(text)
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"expected a number or a fraction such as 8/255, got {text!r}") from error


def check_images(
    images: Tensor, *, name: str = "images", limits: tuple[float, float] = (0.0, 1.0), values: bool = True
) -> Tensor:
    """Return ``images`` if they are a non-empty float tensor (B, C, H, W) with values in [0, 1].

    Args:
        images: Images (B, C, H, W).
        name: Their name in the error.
        limits: Another range than [0, 1].
        values: Check the values too, which reads the device; False checks kind and shape alone.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Wrong number of dimensions, empty, not finite, or outside [0, 1].
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a torch tensor (B, C, H, W), got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"{name} must be floating point in [0, 1], got {images.dtype}; use {name}.float() / 255")
    if images.ndim != 4:
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"{name} are empty: shape {tuple(images.shape)}")
    if not values:
        return images
    low, high = (v.item() for v in images.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} hold values that are not finite")
    if low < limits[0] or high > limits[1]:
        hint = f"use {name} / 255; " if low >= 0 and 2 < high <= 255 else ""
        hint += "normalisation belongs inside the model (create_model(..., mean=, std=)), not in the data"
        raise ValueError(f"{name} must lie in [{limits[0]:g}, {limits[1]:g}], got [{low:.4g}, {high:.4g}]; {hint}")
    return images


def check_labels(
    labels: Tensor, num_classes: int | None = None, *, size: int | None = None, values: bool = True
) -> Tensor:
    """Return ``labels`` if they are whole class numbers (B,) in [0, num_classes).

    Args:
        labels: Class numbers.
        num_classes: Upper bound; not checked if None.
        size: Number of samples; not checked if None.
        values: Check the values too, which reads the device; False checks kind and shape alone.

    Raises:
        TypeError: Not an integer tensor.
        ValueError: Wrong shape or a label out of range.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch tensor (B,), got {type(labels).__name__}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        hint = "; one-hot or soft labels are not supported" if labels.ndim > 1 else "; use labels.long()"
        raise TypeError(f"labels must be class numbers of an integer dtype, got {labels.dtype}{hint}")
    if labels.ndim != 1:
        hint = "use labels.squeeze(1)" if labels.ndim == 2 and labels.shape[1] == 1 else ONE_HOT
        raise ValueError(f"labels must have shape (B,), got {tuple(labels.shape)}; {hint}")
    if size is not None and len(labels) != size:
        raise ValueError(f"got {len(labels)} labels for {size} images")
    if values and len(labels):
        low, high = (v.item() for v in labels.aminmax())
        if low < 0 or (num_classes is not None and high >= num_classes):
            top = "" if num_classes is None else f" to {num_classes - 1}"
            hint = "; leave out samples without a class" if low in (-1, -100) else ""
            raise ValueError(f"labels must be class numbers from 0{top}, got {low} to {high}{hint}")
    return labels


def check_logits(logits: Tensor, batch: int, num_classes: int | None = None, *, mode: str | None = None) -> Tensor:
    """Return ``logits`` if a classifier made them: a float tensor (batch, K), K at least 2.

    Args:
        logits: Output of the model.
        batch: Number of images.
        num_classes: K; not checked if None.
        mode: ``"train"`` or ``"eval"``, the mode that the error names; None names none.

    Raises:
        TypeError: Not a floating-point tensor (a tuple or dict, say).
        ValueError: Another shape.
    """
    where = "" if mode is None else f" in {mode} mode"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        hint = "" if isinstance(logits, Tensor) else "; without auxiliary outputs (features, a second head)"
        kind = f"a tensor of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"the model must return one tensor of logits (B, K), got {kind}{where}{hint}")
    if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        raise ValueError(
            f"the model must return logits (B, K) with one row an image and K at least 2; for {batch} images it "
            f"returned {tuple(logits.shape)}{where} (is the architecture made for this image size?)"
        )
    if num_classes is not None and logits.shape[1] != num_classes:
        raise ValueError(f"the model has {logits.shape[1]} outputs, the data {num_classes} classes")
    return logits


def check_class_counts(class_counts: Sequence[int] | Tensor, num_classes: int | None = None) -> list[int]:
    """Return class counts as a list, if they are whole numbers of at least 1 for at least two classes.

    Args:
        class_counts: Training images of each class (K,).
        num_classes: How many classes the model has, where that is known.

    Raises:
        TypeError: Not whole numbers.
        ValueError: A class without images, fewer than two classes, or another number of classes than the model's.
    """
    if class_counts is None or isinstance(class_counts, (int, float, str)):
        raise TypeError(f"class_counts must be the training images of each class, got {class_counts!r}")
    counts = class_counts.tolist() if hasattr(class_counts, "tolist") else list(class_counts)
    if len(counts) < 2:
        raise ValueError(f"class_counts must have one number a class, at least 2, got {counts}")
    check_matching(len(counts), len(counts) if num_classes is None else num_classes)
    return [check_count(f"class_counts[{c}]", n) for c, n in enumerate(counts)]


def check_matching(counts: int, classes: int) -> None:
    """Refuse class counts for another number of classes than the model has.

    Raises:
        ValueError: They differ.
    """
    if counts != classes:
        raise ValueError(f"got {counts} class_counts for a model of {classes} classes")


def describe_faults(faults: Sequence[str]) -> str:
    """Return the message about faults of batches that were noticed after they had passed."""
    return (
        f"training met {' and '.join(faults)} after the first batch; such batches add nothing to the loss. Look at the "
        "data set and its augmentation"
    )


def looks_like_probabilities(logits: Tensor) -> bool:
    """Whether every row of ``logits`` (B, K) is non-negative and sums to 1, as after a softmax."""
    rows = logits.detach().float()
    return bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-3).all())


def check_model(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is an ``nn.Module``.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    for tensor in model.parameters():
        return tensor.device
    for tensor in model.buffers():
        return tensor.device
    return torch.device("cpu")


def check_device(device: str | torch.device) -> torch.device:
    """Return ``device`` as a torch device if tensors can be put on it.

    Raises:
        ValueError: Unknown, or not on this machine.
    """
    text = str(device)
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind = text.partition(":")[0]
        if kind in _DEVICES:
            raise ValueError(f"device must be a name such as cpu or cuda:0, got {text!r}") from error
        raise unknown_name("device", text, _DEVICES) from error
    try:
        torch.empty(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {text!r} cannot be used here ({_first_line(error)}); try cpu") from error
    return found


_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_about_a_view(error: RuntimeError) -> bool:
    """Whether torch refuses to ``view`` a tensor in the layout that it has, such as a map in channels_last."""
    return "view size is not compatible" in str(error)
