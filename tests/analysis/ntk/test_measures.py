"""Measures of kernels against values by hand, closed forms and invariants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from at_extensions.analysis import (
    effective_rank,
    kernel_distance,
    kernel_specialization,
    kernel_target_alignment,
    top_eigenvalue_mass,
)

EYE, ONES = torch.eye(2), torch.ones(2, 2)
SPECTRA = {  # eigenvalues -> effective rank by entropy, by trace
    (1, 1, 1, 1): (4, 4),
    (2, 1, 1): (2.828427, 2.666667),
    (8, 1, 1): (1.894646, 1.515152),
    (1, 0.5, 0.25, 0.125): (3.117142, 2.647059),
}


def random_kernel(n=6, rank=6, seed=0):
    rows = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ rows.T


def rotated(spectrum, seed=0):
    """A symmetric matrix with these eigenvalues."""
    n = len(spectrum)
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    return basis @ torch.tensor(spectrum, dtype=torch.float64).diag() @ basis.T


def test_kernel_distances_by_hand():
    assert kernel_distance(EYE, ONES) == pytest.approx(1 - 1 / math.sqrt(2), abs=1e-12)
    assert kernel_distance(EYE, torch.tensor([[2.0, 1.0], [1.0, 2.0]])) == pytest.approx(0.105573, abs=1e-6)
    assert kernel_distance(EYE, 3 * EYE) == pytest.approx(0, abs=1e-15)
    assert kernel_distance(EYE, torch.ones(2, 2).fliplr().triu(1) + torch.ones(2, 2).tril(-1)) == pytest.approx(1)


@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_the_kernel_distance_is_symmetric_bounded_and_free_of_scale(seed, scale):
    a, b = random_kernel(seed=seed, rank=2), random_kernel(seed=seed + 1, rank=3)
    distance = kernel_distance(a, b)
    assert 0 <= distance <= 1
    assert kernel_distance(b, scale * a) == pytest.approx(distance, abs=1e-12)
    assert distance == pytest.approx(1 - (a * b).sum().item() / (a.norm() * b.norm()).item(), abs=1e-12)


def test_small_distances_keep_their_digits():
    a = torch.eye(3, dtype=torch.float64)
    b = a.clone()
    b[0, 1] = b[1, 0] = 1e-9
    assert kernel_distance(a, b) == pytest.approx(1e-18 / 3, rel=1e-6)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_effective_ranks_by_hand(spectrum):
    entropy, trace = SPECTRA[spectrum]
    for kernel in (torch.tensor(spectrum).float().diag(), 7 * rotated(spectrum)):
        assert effective_rank(kernel) == pytest.approx(entropy, abs=1e-5)
        assert effective_rank(kernel, "trace") == pytest.approx(trace, abs=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_effective_ranks_are_ordered_and_within_the_rank(seed, rank):
    kernel = random_kernel(seed=seed, rank=rank)
    by_trace, by_entropy = effective_rank(kernel, "trace"), effective_rank(kernel)
    assert 1 - 1e-9 <= by_trace <= by_entropy + 1e-9
    assert by_entropy <= rank + 1e-6


def test_a_rank_of_zero_eigenvalues_is_finite_and_negative_ones_are_rounding():
    assert effective_rank(torch.diag(torch.tensor([1.0, 0.0, 0.0]))) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, -1e-9]))) == pytest.approx(2)


def test_top_eigenvalue_mass_by_hand():
    kernel = rotated((2.0, 1.0, 1.0))
    assert top_eigenvalue_mass(kernel, k=1) == pytest.approx(4 / 6)
    assert top_eigenvalue_mass(kernel, k=2) == pytest.approx(5 / 6)
    assert top_eigenvalue_mass(kernel, k=3) == pytest.approx(1)


def test_kernels_of_all_outputs_have_one_spectrum():
    whole = random_kernel(12)
    kernel = whole.view(4, 3, 4, 3)
    assert effective_rank(kernel) == pytest.approx(effective_rank(whole))
    assert top_eigenvalue_mass(kernel, k=2) == pytest.approx(top_eigenvalue_mass(whole, k=2))


LABELS = torch.tensor([0, 0, 1, 1])


def indicators():
    y = torch.nn.functional.one_hot(LABELS).double()
    return torch.stack([torch.eye(4, dtype=torch.float64) + torch.outer(c, c) for c in y.T])


def test_specialization_by_hand():
    kernels = indicators()
    assert kernel_specialization(kernels, LABELS) == pytest.approx(1.5)
    own = (kernels[0] * torch.outer(kernels[0, 0] - torch.eye(4)[0], torch.ones(4))).sum()
    assert own > 0
    y = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    alignment = (kernels[0] * torch.outer(y, y)).sum() / (kernels[0].norm() * 2)
    assert alignment.item() == pytest.approx(0.866025, abs=1e-6)


def test_equal_kernels_are_not_specialized_and_pure_ones_fully():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    same = random_kernel().expand(3, 6, 6)
    y = torch.nn.functional.one_hot(labels).double()
    pure = torch.stack([torch.outer(c, c) for c in y.T])
    for centred in (False, True):
        assert kernel_specialization(same, labels, centred=centred) == pytest.approx(1)
    assert kernel_specialization(pure, labels, centred=False) == pytest.approx(3)
    assert kernel_specialization(pure, labels) == kernel_specialization(pure, labels, centred=True) < 3


def test_specialization_follows_its_definition():
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    kernels = torch.stack([random_kernel(seed=s) for s in range(3)])
    h = torch.eye(6, dtype=torch.float64) - 1 / 6
    m = torch.zeros(3, 3)
    for c in range(3):
        for d in range(3):
            y = (labels == d).double()
            k, t = h @ kernels[c] @ h, h @ torch.outer(y, y) @ h
            m[c, d] = (k * t).sum() / (k.norm() * t.norm())
    expected = sum(m[c, c] / m[:, c].mean() for c in range(3)) / 3
    assert kernel_specialization(kernels, labels) == pytest.approx(expected.item(), rel=1e-5)


def test_the_centred_specialization_of_two_classes_is_refused():
    kernels = torch.stack([random_kernel(4, seed=s) for s in range(2)])
    with pytest.raises(ValueError, match="two classes is always 1"):
        kernel_specialization(kernels, LABELS, centred=True)
    assert kernel_specialization(kernels, LABELS) == kernel_specialization(kernels, LABELS, centred=False) != 1


def test_target_alignment_by_hand():
    same = (LABELS[:, None] == LABELS).double()
    assert kernel_target_alignment(same, LABELS) == pytest.approx(1)
    assert kernel_target_alignment(3 * same + 2, LABELS, centred=True) == pytest.approx(1)
    assert kernel_target_alignment(torch.eye(4), LABELS) == pytest.approx(4 / (2 * math.sqrt(8)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernel_distance(EYE, torch.eye(3)), ValueError, "one shape"),
        (lambda: kernel_distance(EYE, 0 * EYE), ValueError, "other holds only zeros"),
        (lambda: kernel_distance(EYE.tolist(), EYE), TypeError, "real tensor"),
        (lambda: kernel_distance(EYE / 0, EYE), ValueError, "finite"),
        (lambda: effective_rank(torch.ones(2, 3)), ValueError, r"shape \(N, N\)"),
        (lambda: effective_rank(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), ValueError, "symmetric"),
        (lambda: effective_rank(-EYE), ValueError, "no positive eigenvalue"),
        (lambda: effective_rank(EYE, "entropi"), ValueError, "did you mean 'entropy'"),
        (lambda: top_eigenvalue_mass(EYE, k=3), ValueError, "at most the kernel's 2 rows"),
        (lambda: top_eigenvalue_mass(EYE, k=0), ValueError, "at least 1"),
        (lambda: kernel_target_alignment(EYE, LABELS), ValueError, "4 labels"),
        (lambda: kernel_target_alignment(EYE, LABELS[:2], centred=True), ValueError, "two classes"),
        (lambda: kernel_target_alignment(ONES, torch.tensor([0, 1]), centred=True), ValueError, "constant"),
        (lambda: kernel_specialization(EYE, LABELS[:2]), ValueError, r"shape \(K, N, N\)"),
        (lambda: kernel_specialization(indicators(), torch.zeros(4).long()), ValueError, "no sample is of class 1"),
        (lambda: kernel_specialization(indicators(), LABELS + 1), ValueError, "from 0 to 1"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
