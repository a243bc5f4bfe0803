"""Winograd's convolution along rows against the direct one: exact but for rounding, whatever the batch."""

import pytest
import torch
from torch.nn import functional as F

from at_extensions.folding import onednn, two_way, winograd_rows

pytestmark = pytest.mark.skipif(not onednn.is_available(torch.bfloat16), reason="no oneDNN, or none in bfloat16")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values_and_gradients(convolve, x, cotangent):
    """Return the convolution, its gradient with a cotangent, and the gradient of that gradient's square sum."""
    x, cotangent = x.clone().requires_grad_(), cotangent.clone().requires_grad_()
    y = convolve(x)
    (gradient,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), cotangent)
    return y.detach(), gradient.detach(), second


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 3, 2), (4, 4, 4), (5, 5, 9), (2, 7, 7), (48, 2, 6), (12, 14, 14)])
def test_in_float32_it_is_the_convolution_with_its_first_and_second_derivatives(size, bias, layout):
    batch, *sides = size
    x, weight = random(batch, 16, *sides).contiguous(memory_format=layout), random(24, 16, 3, 3, seed=1)
    b = random(24, seed=2) if bias else None
    kernel = winograd_rows.transform(weight)
    cotangent = random(batch, 24, *sides, seed=3)
    ours = values_and_gradients(lambda x: two_way.conv2d(x, kernel, b), x, cotangent)
    direct = lambda x: F.conv2d(x, weight.double(), None if b is None else b.double(), padding=1)  # noqa: E731
    truth = values_and_gradients(direct, x.double(), cotangent.double())
    for a, t in zip(ours, truth):
        assert a.shape == t.shape
        torch.testing.assert_close(a.double(), t, rtol=0, atol=2e-6 * float(t.abs().max()))
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def error(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm())


def test_in_bfloat16_its_error_is_about_twice_that_of_the_direct_one():
    x = F.relu(random(32, 256, 8, 8)).bfloat16().contiguous(memory_format=torch.channels_last)
    exact = random(256, 256, 3, 3, seed=1) / 48  # the weights are rounded too
    weight = exact.bfloat16().contiguous(memory_format=torch.channels_last)
    cotangent = random(32, 256, 8, 8, seed=2).bfloat16().contiguous(memory_format=torch.channels_last)
    truth = values_and_gradients(lambda x: F.conv2d(x, exact.double(), padding=1), x.double(), cotangent.double())
    direct = values_and_gradients(lambda x: F.conv2d(x, weight, padding=1), x, cotangent)
    kernel = winograd_rows.transform(weight)
    ours = values_and_gradients(lambda x: two_way.conv2d(x, kernel), x, cotangent)
    assert all(a.dtype is torch.bfloat16 for a in ours)
    for a, d, t in zip(ours[:2], direct[:2], truth[:2]):
        assert error(a, t) < 0.005
        assert error(a, t) < 2.1 * error(d, t)


def test_images_are_told_apart():
    x, weight = random(6, 16, 5, 5), random(8, 16, 3, 3, seed=1)
    kernel = winograd_rows.transform(weight)
    together = two_way.conv2d(x, kernel)
    for image, one in zip(x, together):
        torch.testing.assert_close(two_way.conv2d(image[None], kernel)[0], one)


@pytest.mark.parametrize(("batch", "pairs"), [(128, 2), (128, 16), (7, 4), (1, 100), (96, 4)])
def test_rows_of_as_many_images_are_laid_side_by_side_as_fill_the_kernels(batch, pairs):
    together = winograd_rows._together(batch, pairs)
    assert batch % together == 0
    assert together == batch or together * pairs >= winograd_rows._WIDTH
    fewer = [n for n in range(1, together) if batch % n == 0]
    assert all(n * pairs < winograd_rows._WIDTH for n in fewer)
