"""Features that separate the classes though they are not robust: Walsh patterns in images; a low-pass filter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from at_extensions.checks import check_count, check_eps, check_images, check_labels, check_name

INJECTIONS = ("add", "orthogonal", "reverse", "reverse_orthogonal", "carrier_only")
"""How carriers are put into images (``inject``)."""

_FIRST = ((0, 1), (1, 0), (1, 1), (2, 1), (1, 2))  # the paper's (r, c) for ten classes
_SAME_DIRECTION = 1e-9  # smallest eigenvalue of the carriers' Gram matrix, as a share of the largest


def carriers(num_classes: int, shape: Sequence[int]) -> Tensor:
    """Return one pattern of +1 and -1 for each class (K, C, H, W), float32, the same in each channel.

    Patterns are products of Walsh functions in sequency order, W_r(m) W_c(n): orthogonal to each other and of mean 0.
    The first five are (r, c) = (0, 1), (1, 0), (1, 1), (2, 1) and (1, 2), the others follow by r + c, then by r. The
    first ceil(K / 2) classes have a pattern each, the others their negatives. On 32 x 32 images of ten classes these
    are the patterns of "Catastrophic overfitting can be induced with discriminative non-robust features" (arXiv
    2206.08242), sign(cos((2m + 1) r pi / 64) cos((2n + 1) c pi / 64)); for other sizes and more classes this is an
    extension, because the signs of higher cosines are neither orthogonal nor always defined.

    A side of q 2^m pixels with q odd has Walsh functions of order 2^m, each entry repeated q times. So an image allows
    twice as many classes as it has patterns: 2,046 at 32 x 32 and at 224 x 224, 30 at 28 x 28.

    Args:
        num_classes: K, at least 2.
        shape: (C, H, W) of the images; H and W may differ.

    Raises:
        TypeError: Not whole numbers.
        ValueError: An odd side, or more classes than the image allows.
    """
    check_count("num_classes", num_classes, at_least=2)
    channels, height, width = _check_shape(shape)
    rows, columns = walsh(height), walsh(width)
    most = 2 * (_order(height) * _order(width) - 1)
    if num_classes > most:
        raise ValueError(
            f"images of {height} x {width} pixels allow carriers for at most {most} classes, got {num_classes}"
        )
    chosen = _pairs(len(rows), len(columns))[: math.ceil(num_classes / 2)]
    patterns = torch.stack([torch.outer(rows[r], columns[c]) for r, c in chosen])
    patterns = torch.cat([patterns, -patterns])[:num_classes]
    return patterns[:, None].repeat(1, channels, 1, 1).float()


def walsh(side: int) -> Tensor:
    """Return Walsh functions in sequency order (2^m, side), float64: row k changes its sign k times.

    Args:
        side: Pixels, q 2^m with q odd; each entry of the functions of order 2^m is repeated q times.

    Raises:
        TypeError: Not a whole number.
        ValueError: An odd side.
    """
    order = _order(check_count("side", side))
    functions = torch.ones(1, 1, dtype=torch.float64)
    while len(functions) < order:  # Sylvester's Hadamard matrices
        functions = torch.cat([functions.repeat(1, 2), torch.cat([functions, -functions], 1)])
    changes = (functions[:, 1:] != functions[:, :-1]).sum(1)
    return functions[changes.argsort()].repeat_interleave(side // order, 1)


def inject(x: Tensor, y: Tensor, carriers: Tensor, beta: float, *, mode: str = "add") -> Tensor:
    """Return images with the carrier V_y of their class, of amplitude beta; they are not clipped.

    - ``"add"``: x + beta V_y, in [-beta, 1 + beta].
    - ``"orthogonal"``: (I - P) x + beta V_y, where P projects onto the span of all carriers: what was there of them is
      removed first.
    - ``"reverse"``: x - beta V_y, and ``"reverse_orthogonal"``: (I - P) x - beta V_y.
    - ``"carrier_only"``: beta V_y on a black image.

    Args:
        x: Images (B, C, H, W), floating point.
        y: Class numbers (B,), or any other numbers of carriers.
        carriers: (K, C, H, W), such as ``carriers(K, (C, H, W))``.
        beta: Amplitude in [0, 1], such as 8/255.
        mode: One of ``INJECTIONS``.

    Raises:
        TypeError: Not float images, labels that are not whole numbers, a beta that is not a number.
        ValueError: A beta outside [0, 1], carriers for other images, labels beyond K, an unknown mode.
    """
    check_name("mode", mode, INJECTIONS)
    check_images(x, values=False)
    beta = check_beta(beta)
    carriers = _check_carriers(carriers, x).to(x)
    check_labels(y, len(carriers), size=len(x))
    moved = beta * carriers[y.long().to(x.device)]
    if mode == "carrier_only":
        return moved
    if mode.endswith("orthogonal"):
        x = remove_carriers(x, carriers)
    return x - moved if mode.startswith("reverse") else x + moved


def remove_carriers(x: Tensor, carriers: Tensor) -> Tensor:
    """Return (I - P) x, images without their component in the span of the carriers.

    Args:
        x: Images (B, C, H, W), floating point.
        carriers: (K, C, H, W).

    Raises:
        TypeError: Not float images.
        ValueError: Carriers for other images.
    """
    check_images(x, values=False)
    basis = carrier_basis(_check_carriers(carriers, x).to(x.device))
    flat = x.flatten(1).to(basis.dtype)
    return (flat - (flat @ basis.T) @ basis).to(x.dtype).view_as(x)


def carrier_basis(carriers: Tensor) -> Tensor:
    """Return an orthonormal basis of the carriers' span (R, C H W), float64: P = basis^T basis has trace R, their rank.

    Args:
        carriers: (K, C, H, W); equal, opposite and linearly dependent ones count once.
    """
    flat = carriers.flatten(1).double()
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    kept = values > _SAME_DIRECTION * values[-1]
    return (vectors[:, kept] / values[kept].sqrt()).T @ flat


def injected_range(carriers: Tensor, beta: float, mode: str = "add") -> tuple[float, float]:
    """Return the smallest range that holds ``inject`` of every image in [0, 1], as float32 computes it.

    For the orthogonal modes the lowest value of (I - P) x is minus the sum of the positive entries of P's row outside
    the diagonal. With Walsh patterns it is the same for each pixel.

    Args:
        carriers: (K, C, H, W) from ``carriers``.
        beta: Amplitude in [0, 1].
        mode: One of ``INJECTIONS``.

    Raises:
        ValueError: A beta outside [0, 1], an unknown mode.
    """
    check_name("mode", mode, INJECTIONS)
    move = torch.tensor(check_beta(beta))
    low, high = torch.zeros(()), torch.zeros(()) if mode == "carrier_only" else torch.ones(())
    if mode.endswith("orthogonal"):
        basis = carrier_basis(carriers)
        row = -(basis[:, 0] @ basis)
        row[0] += 1
        low, high = row.clamp(max=0).sum().float() - 1e-5, row.clamp(min=0).sum().float() + 1e-5  # float32's rounding
    return (low - move).item(), (high + move).item()


def count_outside(images: Tensor, limits: tuple[float, float] = (0.0, 1.0)) -> int:
    """Return how many values of images (of any shape) lie outside a range."""
    return int(((images < limits[0]) | (images > limits[1])).sum())


def low_pass(x: Tensor, cutoff: int) -> Tensor:
    """Return images of which the lowest frequencies are kept along both axes: DCT coefficients (r, c) below the cutoff.

    Args:
        x: Images (..., H, W), floating point.
        cutoff: Coefficients with r < cutoff and c < cutoff are kept, at least 1; the larger side keeps everything.

    Raises:
        TypeError: Not floating point, or a cutoff that is not a whole number.
        ValueError: A cutoff below 1 or above the larger side.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise TypeError("x must be a floating-point tensor of images (..., H, W)")
    height, width = x.shape[-2:]
    if check_count("cutoff", cutoff) > max(height, width):
        raise ValueError(f"cutoff must lie in 1 to {max(height, width)} for images of {height} x {width}, got {cutoff}")
    rows, columns = (_dct(side)[:cutoff].to(x) for side in (height, width))
    return rows.T @ (rows @ x @ columns.T) @ columns


def check_beta(beta: float) -> float:
    """Return the amplitude of a carrier if it lies in [0, 1].

    Raises:
        TypeError: Not a number.
        ValueError: Outside [0, 1]; 8 is answered with 8/255.
    """
    return 0.0 if not isinstance(beta, bool) and beta == 0 else check_eps(beta, name="beta")


def _dct(side: int) -> Tensor:
    """Return the orthonormal DCT-II (side, side), float64: row k is cos((2n + 1) k pi / (2 side)), scaled to norm 1."""
    k, n = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    matrix = torch.cos((2 * n + 1) * k * (math.pi / (2 * side))) * (2 / side) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def _order(side: int) -> int:
    """Return the largest power of two that divides a side."""
    if side % 2:
        raise ValueError(
            f"carriers need sides of an even number of pixels, got {side}: no pattern of +1 and -1 has mean 0 along an "
            "odd side; crop or pad the images"
        )
    return side & -side


def _pairs(rows: int, columns: int) -> list[tuple[int, int]]:
    """Return the (r, c) of all patterns but the constant one, in the order of the classes."""
    every = [(r, c) for r in range(rows) for c in range(columns) if r + c > 0 and (r, c) not in _FIRST]
    first = [(r, c) for r, c in _FIRST if r < rows and c < columns]
    return first + sorted(every, key=lambda pair: (sum(pair), pair))


def _check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if isinstance(shape, (int, str)) or len(shape) != 3:
        raise ValueError(f"shape must be (C, H, W), got {shape!r}")
    channels, height, width = (check_count(name, side) for name, side in zip(("C", "H", "W"), shape))
    return channels, height, width


def _check_carriers(carriers: Tensor, x: Tensor) -> Tensor:
    if not isinstance(carriers, Tensor) or carriers.ndim != 4:
        raise TypeError("carriers must be a tensor (K, C, H, W), such as data.carriers(K, (C, H, W))")
    if carriers.shape[1:] != x.shape[1:]:
        raise ValueError(f"carriers are for images {tuple(carriers.shape[1:])}, got images {tuple(x.shape[1:])}")
    return carriers
