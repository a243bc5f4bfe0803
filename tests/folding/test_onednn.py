"""Convolutions with oneDNN's packed weights against torch's own in float64, with all their derivatives."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from at_extensions.folding import onednn
from at_extensions.folding.onednn import Packed

needs_onednn = pytest.mark.skipif(not onednn.is_available(torch.float32), reason="torch without oneDNN")
needs_bf16 = pytest.mark.skipif(not onednn.is_available(torch.bfloat16), reason="a CPU without bfloat16")
pytestmark = needs_onednn

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]
GEOMETRIES = [  # channels in, out, kernel, stride, padding, dilation, height, width
    (16, 24, 3, 1, 1, 1, 8, 8),
    (16, 16, 3, 1, 0, 1, 9, 7),
    (16, 8, 3, 1, 2, 2, 9, 9),
    (16, 8, 3, 1, "same", 1, 6, 5),
    (16, 8, 5, 1, "valid", 1, 9, 9),
    (16, 8, (1, 3), 1, (0, 1), 1, 6, 5),
    (16, 8, 3, 1, 3, 1, 6, 6),  # more padding than the kernel reads: its gradient is torch's own
    (16, 8, 1, 1, 0, 1, 6, 6),
    (16, 8, 1, 2, 0, 1, 8, 8),
    (16, 8, 1, (2, 3), 0, 1, 8, 9),
    (16, 8, 1, 2, 0, 1, 7, 9),
    (16, 8, 1, 2, 1, 1, 8, 8),
    (16, 8, 3, 2, 1, 1, 8, 8),
    (3, 16, 3, 1, 1, 1, 8, 8),  # images: their gradient in blocks
    (3, 16, 3, 1, 1, 1, 7, 8),  # that no blocks fill
    (1, 16, 5, 1, 2, 1, 8, 6),
    (4, 16, 3, 1, 0, 1, 8, 8),
    (2, 16, (1, 3), 1, (0, 1), 1, 6, 4),
    (3, 16, 3, 1, 2, 2, 8, 8),
    (3, 16, 7, 2, 3, 1, 8, 8),
    (16, 3, 3, 1, 1, 1, 1, 1),
]


def make(geometry, dtype, bias=True):
    inputs, outputs, kernel, stride, padding, dilation, height, width = geometry
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias)
    conv = conv.to(dtype, memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(3, inputs, height, width).to(dtype).to(memory_format=torch.channels_last)
    return conv, x.requires_grad_()


def double(conv):
    """The truth: the same numbers in float64, by torch."""
    settings = conv.stride, conv.padding, conv.dilation
    bias = None if conv.bias is None else conv.bias.double()
    return lambda x: F.conv2d(x, conv.weight.double(), bias, *settings)


def assert_close(ours, truth, dtype):
    tolerance = TOLERANCE[dtype] * float(truth.detach().abs().max())
    torch.testing.assert_close(ours.double(), truth.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry_with_sums_and_relu(geometry, dtype):
    for bias, relu, adds in itertools.product((True, False), repeat=3):
        conv, x = make(geometry, dtype, bias)
        packed = Packed(conv)
        truth = double(conv)(x.double())
        assert packed.size_of(x) == truth.shape
        other = torch.randn(truth.shape).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
        out = packed(x, other if adds else None, relu=relu)
        truth = truth + other.double() if adds else truth
        truth = F.relu(truth) if relu else truth
        assert out.dtype is dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_close(out, truth, dtype)
        weights = torch.randn(truth.shape).to(dtype)
        wanted = (x, other) if adds else (x,)
        # of the very ReLU's zeros that ours has: near zero, bfloat16 rounds some away
        masked = weights.double() * (out.detach() > 0) if relu else weights.double()
        expected = torch.autograd.grad(double(conv)(x.double()), x, masked)[0]
        gradients = torch.autograd.grad(out, wanted, weights)
        assert_close(gradients[0], expected, dtype)
        assert gradients[0].shape == x.shape
        if adds:
            assert_close(gradients[1], masked, dtype)
        with torch.no_grad():
            assert torch.equal(packed(x, other if adds else None, relu=relu), out)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_second_derivatives(geometry):
    conv, x = make(geometry, torch.float32)
    packed, reference = Packed(conv), double(conv)

    def penalty(f, x, other):
        gradient = torch.autograd.grad(f(x, other).square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), (x, other))

    other = torch.randn(packed.size_of(x)).to(memory_format=torch.channels_last).requires_grad_()
    ours = penalty(lambda x, other: packed(x, other, relu=True), x, other)
    x64, other64 = (t.detach().double().requires_grad_() for t in (x, other))
    truth = penalty(lambda x, other: F.relu(reference(x) + other), x64, other64)
    for a, b in zip(ours, truth):
        assert_close(a, b, torch.float32)


def test_a_gradient_in_any_layout_is_taken():
    conv, x = make(GEOMETRIES[0], torch.float32)
    out = Packed(conv)(x, relu=True)
    grad = torch.randn(out.shape)
    expected = torch.autograd.grad(out, x, grad, retain_graph=True)[0]
    for same in (grad.to(memory_format=torch.channels_last), grad.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(torch.autograd.grad(out, x, same, retain_graph=True)[0], expected)
    ones = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]  # expanded from one number
    torch.testing.assert_close(ones, torch.autograd.grad(out, x, torch.ones_like(out))[0])


def test_the_gradient_is_that_of_the_weights_the_forward_pass_had():
    conv, x = make(GEOMETRIES[0], torch.float32)
    truth = torch.autograd.grad(double(conv)(x.double()).sum(), x)[0]
    out = Packed(conv)(x)
    conv.weight.data.zero_()
    assert_close(torch.autograd.grad(out.sum(), x)[0], truth, torch.float32)


@needs_bf16
def test_a_sum_is_rounded_once():
    conv, x = make(GEOMETRIES[0], torch.bfloat16)
    other = torch.randn(3, 24, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    truth = F.relu(double(conv)(x.double()) + other.double())
    ours = Packed(conv)(x, other, relu=True).double()
    twice = F.relu(F.conv2d(x, conv.weight, conv.bias, 1, 1) + other).double()
    assert (ours - truth).norm() < 0.9 * (twice - truth).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_laid_out_for_every_size_of_images(dtype, monkeypatch):
    monkeypatch.setattr(onednn, "_LAYOUTS", 3)
    conv, _ = make((96, 96, 3, 1, 1, 1, 8, 8), dtype)
    packed, truth = Packed(conv), double(conv)
    for batch, side in ((1, 8), (3, 8), (5, 8), (2, 4), (2, 16), (3, 8), (2, 7), (2, 5), (1, 8)):  # more than are kept
        x = torch.randn(batch, 96, side, side).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
        out = packed(x)
        assert_close(out, truth(x.double()), dtype)
        expected = torch.autograd.grad(truth(x.double()).square().sum(), x)[0]
        assert_close(torch.autograd.grad(out.double().square().sum(), x)[0], expected, dtype)
        assert len(packed._forward._of_layout) <= 3
    assert packed._forward._for((1, 96, 8, 8)) is packed._forward._for((7, 96, 8, 8))  # one for every batch


VERBOSE = """
import torch
from at_extensions.folding import onednn
conv = torch.nn.Conv2d(96, 192, {kernel}, padding={kernel} // 2).requires_grad_(False)
conv = conv.to(torch.{dtype}, memory_format=torch.channels_last)
x = torch.randn(4, 96, 8, 8).to(torch.{dtype}).to(memory_format=torch.channels_last).requires_grad_()
packed = onednn.Packed(conv)
for _ in range(2):
    print("again", flush=True)
    torch.autograd.grad(packed(x).sum(), x)
"""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_no_call_but_the_first_brings_weights_into_another_layout(kernel, dtype):
    code = VERBOSE.format(kernel=kernel, dtype=str(dtype).removeprefix("torch."))
    environment = os.environ | {"ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    again = done.stdout.split("again")[-1]
    if "convolution" not in again:
        pytest.skip("this oneDNN does not say what it does")
    assert "reorder" not in again


def test_what_it_cannot_do_it_does_not_offer():
    assert not onednn.is_available(torch.float64)
    assert not onednn.is_available(torch.float16)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.is_available(torch.float32)
    assert onednn.is_available(torch.float32)
    assert onednn.padding_of(nn.Conv2d(3, 3, 2, padding="same")) is None  # more zeros on one side than on the other
    assert onednn.padding_of(nn.Conv2d(3, 3, 3, padding="same", dilation=2)) == [2, 2]
    assert onednn.padding_of(nn.Conv2d(3, 3, 3, padding="valid")) == [0, 0]
    assert onednn.padding_of(nn.Conv2d(3, 3, 3, padding=(1, 2))) == [1, 2]


def test_other_cpus_keep_torchs_own(monkeypatch):
    onednn._works.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    try:
        assert not onednn.is_available(torch.float32)
    finally:
        onednn._works.cache_clear()


@pytest.mark.parametrize("failure", [None, RuntimeError, AttributeError])
def test_operators_that_are_gone_or_compute_something_else_are_not_used(failure, monkeypatch):
    def compute(self, x, other, relu):
        if failure is not None:
            raise failure("no such operator")
        return torch.zeros(2, 8, 6, 6)

    onednn._works.cache_clear()
    monkeypatch.setattr(Packed, "compute", compute)
    try:
        assert not onednn.is_available(torch.float32)
    finally:
        onednn._works.cache_clear()
