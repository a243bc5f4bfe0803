"""Winograd's convolution against the direct one, in float64, and how many digits it keeps in float32."""

import pytest
import torch
from torch.nn import functional as F

from at_extensions.folding.cpu import winograd


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def values_and_gradients(convolve, x, cotangent):
    """Return the convolution, its gradient with a cotangent, and the gradient of that gradient's square sum."""
    x, cotangent = x.clone().requires_grad_(), cotangent.clone().requires_grad_()
    y = convolve(x)
    (gradient,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), cotangent)
    return y.detach(), gradient.detach(), second


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (4, 4), (5, 9), (7, 7), (8, 12), (14, 14)])
def test_it_is_the_convolution_with_its_first_and_second_derivatives(size, bias, layout):
    x, weight = random(3, 5, *size).contiguous(memory_format=layout), random(7, 5, 3, 3, seed=1)
    b = random(7, seed=2) if bias else None
    kernel = winograd.transform(weight)
    cotangent = random(3, 7, *size, seed=3)
    ours = values_and_gradients(lambda x: winograd.conv2d(x, kernel, b), x, cotangent)
    truth = values_and_gradients(lambda x: F.conv2d(x, weight, b, padding=1), x, cotangent)
    for a, t in zip(ours, truth):
        assert a.shape == t.shape
        torch.testing.assert_close(a, t, rtol=0, atol=1e-11)


def test_in_float32_it_keeps_five_digits():
    x, weight = random(4, 256, 8, 8, dtype=torch.float32), random(256, 256, 3, 3, dtype=torch.float32, seed=1)
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    ours = winograd.conv2d(x, winograd.transform(weight))
    assert ours.dtype is torch.float32
    assert ((ours - truth).norm() / truth.norm()).item() < 1e-5


def test_the_weights_of_the_gradient_are_those_of_the_turned_kernel():
    weight, x, grad = random(4, 6, 3, 3), random(2, 6, 5, 5, seed=1), random(2, 4, 5, 5, seed=2)
    kernel, turned = winograd.transform(weight), winograd.transform(weight.flip(2, 3).transpose(0, 1))
    crossed = winograd.Weights(kernel.backward, kernel.forward)
    for a, b, image in ((kernel, winograd.Weights(turned.backward, turned.forward), x), (crossed, turned, grad)):
        assert torch.equal(winograd.conv2d(image, a), winograd.conv2d(image, b))
    torch.testing.assert_close(winograd.conv2d(grad, crossed), F.conv_transpose2d(grad, weight, padding=1))
