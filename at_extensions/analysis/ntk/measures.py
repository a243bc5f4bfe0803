"""Measures of kernels, in float64: distance, effective rank, leading eigenvalues, alignment and specialisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from at_extensions.checks import check_count, check_labels, check_name

RANKS = ("entropy", "trace")
"""Roy-Vetterli's effective rank; the ratio of squared trace and squared Frobenius norm, which needs no eigenvalues."""


def kernel_distance(kernel: Tensor, other: Tensor) -> float:
    """Return 1 - <K, K'>_F / (|K|_F |K'|_F), the kernel distance.

    It is 0 for kernels that are multiples of each other and at most 1 for positive semidefinite ones. The definition is
    that of Fort et al. (arXiv 2010.15110), which Loo et al. measured along adversarial training.

    Args:
        kernel: A kernel of any shape that ``empirical_ntk`` returns.
        other: Another of the same shape.

    Raises:
        TypeError: Not a real tensor.
        ValueError: Different shapes, values that are not finite, or a kernel of zeros.
    """
    a, b = _check(kernel, "kernel"), _check(other, "other")
    if a.shape != b.shape:
        raise ValueError(f"kernels must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a / a.norm(), b / b.norm()
    return (a - b).square().sum().item() / 2  # equal to 1 - <a, b>, and loses no digits near 0


def effective_rank(kernel: Tensor, kind: str = "entropy") -> float:
    """Return the number of directions that a kernel's spectrum is spread over, between 1 and N.

    With eigenvalues lambda (clamped at 0) and p = lambda / sum lambda: ``"entropy"`` is exp(-sum p log p) (Roy &
    Vetterli 2007); ``"trace"`` is (tr K)^2 / |K|_F^2, at most the former, and needs no eigenvalues.

    Args:
        kernel: Symmetric, (N, N) or (N, K, N, K).
        kind: ``"entropy"`` or ``"trace"``.

    Raises:
        TypeError: Not a real tensor.
        ValueError: Not square and symmetric, values that are not finite, a kernel of zeros, or another ``kind``.
    """
    check_name("kind", kind, RANKS)
    matrix = _symmetric(kernel)
    if kind == "trace":
        scaled = matrix / matrix.norm()
        return scaled.trace().item() ** 2
    p = _spectrum(matrix)
    p = p / p.sum()
    return math.exp(-torch.special.xlogy(p, p).sum().item())


def top_eigenvalue_mass(kernel: Tensor, k: int = 10) -> float:
    """Return the share of the k largest eigenvalues in |K|_F^2, the sum of all squared ones, in (0, 1].

    Args:
        kernel: Symmetric, (N, N) or (N, K, N, K).
        k: Number of eigenvalues, at most the kernel's rows.

    Raises:
        TypeError: Not a real tensor, or ``k`` not a whole number.
        ValueError: Not square and symmetric, values that are not finite, a kernel of zeros, or ``k`` out of range.
    """
    matrix = _symmetric(kernel)
    check_count("k", k)
    if k > len(matrix):
        raise ValueError(f"k must be at most the kernel's {len(matrix)} rows, got {k}")
    squares = _spectrum(matrix).square()
    return (squares.topk(k).values.sum() / squares.sum()).item()


def kernel_target_alignment(kernel: Tensor, labels: Tensor, *, centred: bool = False) -> float:
    """Return the alignment of a kernel with Y Y^T, <K, Y Y^T>_F / (|K|_F |Y Y^T|_F), Y being one-hot labels.

    Cristianini et al. (2001); centred as by Cortes et al. (2012). (Y Y^T)(i, j) is 1 where samples are of one class.

    Args:
        kernel: Symmetric, (N, N).
        labels: Class numbers (N,).
        centred: Centre both kernels, K -> H K H with H = I - 1 1^T / N.

    Raises:
        TypeError: Not a real tensor, or not class numbers.
        ValueError: Not square and symmetric, values that are not finite, a kernel of zeros (after centring, too),
            labels of another number of samples, or a single class with ``centred``.
    """
    matrix = _symmetric(kernel)
    check_labels(labels, size=len(matrix))
    same = (labels.unsqueeze(0) == labels.unsqueeze(1)).double().to(matrix.device)
    if centred:
        if same.all():
            raise ValueError("the centred alignment needs labels of two classes at least")
        matrix, same = _centre(matrix), _centre(same)
    return _alignment(matrix, same)


def kernel_specialization(kernels: Tensor, labels: Tensor, *, centred: bool | None = None) -> float:
    """Return how much better each class's kernel is aligned with its own class than the others' kernels are.

    With the alignment A of the kernel K_c of logit c and the indicator y_d of class d,

        M(c, d) = A(K_c, y_d y_d^T),    KS = mean over c of M(c, c) / mean over e of M(e, c).

    It is 1 where kernels do not differ, and at most K. A reconstruction of the specialisation of Shan & Bordelon
    (arXiv 2105.14301).

    Args:
        kernels: One symmetric kernel a class, (K, N, N), as ``empirical_ntk(outputs="class")`` returns it.
        labels: Class numbers (N,), each class at least once.
        centred: Centre kernels and indicators. None centres for K > 2 alone: the indicators of two classes are
            opposite, so that the centred specialisation of K = 2 is 1 for any kernels.

    Raises:
        TypeError: Not a real tensor, or not class numbers.
        ValueError: Another shape, values that are not finite, labels out of range or a class without samples, centring
            for K = 2, or alignments that are not positive on average.
    """
    found = _check(kernels, "kernels")
    if found.ndim != 3 or found.shape[1] != found.shape[2] or len(found) < 2:
        raise ValueError(f"kernels must have shape (K, N, N), K at least 2, got {tuple(found.shape)}")
    number = len(found)
    check_labels(labels, number, size=found.shape[1])
    counts = torch.bincount(labels, minlength=number)
    if (counts == 0).any():
        raise ValueError(f"no sample is of class {int((counts == 0).nonzero()[0])}; each class needs one at least")
    if centred and number == 2:
        raise ValueError("the centred specialisation of two classes is always 1; use centred=False")
    centred = number > 2 if centred is None else centred
    matrices = [_symmetric(k) for k in found]
    members = torch.nn.functional.one_hot(labels, number).double().to(found.device)
    targets = [torch.outer(y, y) for y in members.T]
    if centred:
        matrices, targets = [_centre(k) for k in matrices], [_centre(t) for t in targets]
    m = torch.tensor([[_alignment(k, t) for t in targets] for k in matrices], dtype=torch.float64)
    means = m.mean(0)
    if (means <= 0).any():
        raise ValueError("kernels are not aligned with a class on average; they are no kernels of these samples")
    return (m.diagonal() / means).mean().item()


def _check(kernel: Tensor, name: str) -> Tensor:
    """Return a kernel in float64."""
    if not isinstance(kernel, Tensor) or kernel.is_complex() or kernel.dtype == torch.bool:
        kind = f"a tensor of {kernel.dtype}" if isinstance(kernel, Tensor) else type(kernel).__name__
        raise TypeError(f"{name} must be a real tensor, got {kind}")
    found = kernel.detach().double()
    if found.numel() == 0 or not found.isfinite().all():
        raise ValueError(f"{name} must hold finite values, and some")
    if not found.any():
        raise ValueError(f"{name} holds only zeros")
    return found


def _symmetric(kernel: Tensor) -> Tensor:
    """Return a kernel as a symmetric matrix in float64."""
    found = _check(kernel, "kernel")
    if found.ndim == 4 and found.shape[:2] == found.shape[2:]:
        found = found.flatten(2).flatten(0, 1)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ValueError(f"kernel must have shape (N, N) or (N, K, N, K), got {tuple(kernel.shape)}")
    if (found - found.T).abs().max() > 1e-5 * found.abs().max():
        raise ValueError("kernel must be symmetric; kernels of x against x2 have no spectrum")
    return (found + found.T) / 2


def _spectrum(matrix: Tensor) -> Tensor:
    """Return eigenvalues, rounding errors below 0 set to 0."""
    found = torch.linalg.eigvalsh(matrix).clamp_min(0)
    if not found.any():
        raise ValueError("kernel has no positive eigenvalue")
    return found


def _centre(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(0, keepdim=True) - matrix.mean(1, keepdim=True) + matrix.mean()


def _alignment(a: Tensor, b: Tensor) -> float:
    sizes = a.norm() * b.norm()
    if not sizes > 0:
        raise ValueError("a kernel or a target is constant, so that centring leaves nothing")
    return ((a * b).sum() / sizes).item()
