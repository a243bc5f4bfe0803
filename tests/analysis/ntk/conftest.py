"""The slow truth: kernels from explicit gradients of single samples."""

import pytest
import torch


def _gradients(model, x, names=None):
    """Return d f_a(x_i) / d theta, (N, K, P), one image and one output at a time."""
    chosen = [p for name, p in model.named_parameters() if names is None or name in names]
    rows = []
    for image in x.split(1):
        (logits,) = model(image)
        rows.append([])
        for logit in logits:
            found = torch.autograd.grad(logit, chosen, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, chosen)]
            rows[-1].append(torch.cat([part.flatten() for part in parts]))
    return torch.stack([torch.stack(row) for row in rows])


def _explicit(model, x, x2=None, *, outputs="all", names=None):
    left = _gradients(model, x, names)
    right = left if x2 is None else _gradients(model, x2, names)
    every = torch.einsum("iap,jbp->iajb", left, right)
    if outputs == "all":
        return every
    if outputs == "sum":
        return every.sum((1, 3))
    each = torch.einsum("iaja->aij", every)
    return each if outputs == "class" else each.sum(0) if outputs == "trace" else each[outputs]


@pytest.fixture(scope="session")
def explicit():
    """Return the maker of kernels from explicit gradients of single samples; ``names`` selects parameters."""
    return _explicit


def _assert_equal(found, truth, tolerance=1e-12):
    assert found.shape == truth.shape
    assert truth.abs().max() > 0
    assert (found - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.fixture(scope="session")
def assert_equal():
    """Return the comparison of two kernels, relative to the largest entry."""
    return _assert_equal
