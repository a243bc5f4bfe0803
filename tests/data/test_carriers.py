"""Carriers, their injection and the low-pass filter, against closed forms."""

import math

import pytest
import torch

from at_extensions.data import carrier_basis, carriers, inject, injected_range, low_pass, remove_carriers
from at_extensions.data.carriers import count_outside, walsh

BETA = 8 / 255
SIZES = [(28, 28), (32, 32), (48, 48), (96, 96), (224, 224), (8, 8), (12, 32), (6, 4)]


def images(n=6, shape=(3, 32, 32), dtype=torch.float32):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def cosine(k, side):
    """Sign of the k-th cosine of the DCT-II."""
    return torch.cos((2 * torch.arange(side, dtype=torch.float64) + 1) * k * math.pi / (2 * side)).sign()


@pytest.mark.parametrize("k", [0, 1, 2, 4, 8, 16])
def test_walsh_functions_are_signs_of_cosines_where_those_are_orthogonal(k):
    assert torch.equal(walsh(32)[k], cosine(k, 32))


@pytest.mark.parametrize("side", [2, 8, 28, 48])
def test_a_walsh_function_changes_its_sign_as_often_as_its_number_says(side):
    functions = walsh(side)
    assert (functions[:, 1:] != functions[:, :-1]).sum(1).tolist() == list(range(len(functions)))
    assert torch.equal(functions @ functions.T, side * torch.eye(len(functions), dtype=torch.float64))


def test_ten_classes_have_the_papers_patterns():
    found = carriers(10, (3, 32, 32))
    for number, (r, c) in enumerate([(0, 1), (1, 0), (1, 1), (2, 1), (1, 2)]):
        pattern = torch.outer(cosine(r, 32), cosine(c, 32)).float()
        for channel in range(3):
            assert torch.equal(found[number, channel], pattern)
            assert torch.equal(found[number + 5, channel], -pattern)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("num_classes", [2, 5, 10, "all"])
def test_patterns_are_balanced_signs_orthogonal_or_opposite(height, width, num_classes):
    most = 2 * ((height & -height) * (width & -width) - 1)
    k = most if num_classes == "all" else num_classes
    if num_classes == "all" and height > 48:
        k = 100
    found = carriers(k, (1, height, width))
    assert found.shape == (k, 1, height, width)
    assert torch.equal(found.abs(), torch.ones_like(found))
    assert torch.equal(found.sum((1, 2, 3)), torch.zeros(k))
    gram = found.flatten(1) @ found.flatten(1).T / (height * width)
    half = math.ceil(k / 2)
    expected = torch.eye(k)
    expected[torch.arange(k - half), torch.arange(half, k)] = -1
    expected[torch.arange(half, k), torch.arange(k - half)] = -1
    assert torch.equal(gram, expected)


def test_more_classes_only_add_patterns():
    assert torch.equal(carriers(10, (1, 32, 32))[:5], carriers(200, (1, 32, 32))[:5])


@pytest.mark.parametrize(
    ("num_classes", "shape", "message"),
    [
        (31, (1, 28, 28), "28 x 28 pixels allow carriers for at most 30 classes, got 31"),
        (2047, (3, 32, 32), "at most 2046"),
        (10, (3, 33, 32), "even number of pixels, got 33"),
        (10, (3, 32, 7), "even number of pixels, got 7"),
        (1, (3, 32, 32), "num_classes must be at least 2"),
        (10, (32, 32), r"\(C, H, W\)"),
        (10, 32, r"\(C, H, W\)"),
    ],
)
def test_images_that_have_no_such_carriers_are_refused(num_classes, shape, message):
    with pytest.raises(ValueError, match=message):
        carriers(num_classes, shape)


def test_the_projector_is_idempotent_and_its_trace_is_the_rank():
    for k, rank in ((10, 5), (9, 5), (7, 4), (2, 1)):
        basis = carrier_basis(carriers(k, (1, 8, 8)))
        projector = basis.T @ basis
        assert projector.trace().item() == pytest.approx(rank, abs=1e-12)
        torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-13)


def test_dependent_patterns_count_once():
    found = carriers(4, (1, 8, 8))
    mixed = torch.cat([found, (found[:1] + found[1:2]) / 2, 3 * found[:1]])
    basis, plain = carrier_basis(mixed), carrier_basis(found)
    assert len(basis) == 2
    torch.testing.assert_close(basis.T @ basis, plain.T @ plain, rtol=0, atol=1e-12)


def test_each_mode_is_its_formula():
    x, y, v = images(dtype=torch.float64), torch.tensor([0, 3, 5, 9, 9, 2]), carriers(10, (3, 32, 32)).double()
    flat = v[:5].flatten(1)
    component = (x.flatten(1) @ flat.T / 3072) @ flat
    removed = x - component.view_as(x)
    expected = {
        "add": x + BETA * v[y],
        "orthogonal": removed + BETA * v[y],
        "reverse": x - BETA * v[y],
        "reverse_orthogonal": removed - BETA * v[y],
        "carrier_only": BETA * v[y],
    }
    for mode, value in expected.items():
        torch.testing.assert_close(inject(x, y, v, BETA, mode=mode), value, rtol=0, atol=1e-12)
    assert (inject(x, y, v, BETA) - x).flatten(1).norm(dim=1).tolist() == pytest.approx([BETA * 3072**0.5] * 6)
    torch.testing.assert_close(remove_carriers(x, v), removed, rtol=0, atol=1e-12)
    assert (remove_carriers(x, v).flatten(1) @ flat.T).abs().max() < 1e-10


def test_what_was_added_can_be_taken_away():
    x, y, v = images(), torch.arange(6), carriers(10, (3, 32, 32))
    there = inject(x, y, v, BETA)
    assert (there - x).abs().max() > 0.03
    torch.testing.assert_close(inject(there, y, v, BETA, mode="reverse"), x, rtol=0, atol=1e-7)
    assert torch.equal(inject(x, y, v, 0), x)


@pytest.mark.parametrize("mode", ["add", "reverse", "orthogonal", "reverse_orthogonal", "carrier_only"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 32)])
def test_the_range_holds_every_image_and_none_is_smaller(mode, shape):
    v = carriers(6, shape)
    low, high = injected_range(v, BETA, mode)
    y = torch.arange(6).repeat(20)
    x = images(120, shape)
    x[:60] = (x[:60] > 0.5).float()  # black and white alone
    basis = carrier_basis(v)
    for pixel in (0, 37):  # the images that bring a pixel to its extremes
        row = -(basis[:, pixel] @ basis)
        row[pixel] += 1
        x[60 + pixel % 7] = (row > 0).view(shape).float()
        x[80 + pixel % 7] = (row < 0).view(shape).float()
    found = torch.cat([inject(x, (y + shift) % 6, v, BETA, mode=mode) for shift in range(6)])
    assert low <= found.min().item() <= low + 1e-4
    assert high - 1e-4 <= found.max().item() <= high


def test_values_outside_are_counted():
    x = torch.tensor([[[[-0.01, 0.0], [1.0, 1.02]]]])
    assert count_outside(x) == 2
    assert count_outside(x, (-0.02, 1.0)) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 8}, ValueError, "did you mean 8/255"),
        ({"beta": -0.1}, ValueError, "beta must lie in"),
        ({"beta": "8/255"}, TypeError, "beta must be a number"),
        ({"mode": "subtract"}, ValueError, "unknown mode 'subtract'"),
        ({"carriers": carriers(10, (1, 32, 32))}, ValueError, r"for images \(1, 32, 32\), got images \(3, 32, 32\)"),
        ({"carriers": carriers(2, (3, 32, 32))}, ValueError, "from 0 to 1"),
        ({"y": torch.zeros(6)}, TypeError, "integer"),
        ({"y": torch.zeros(5).long()}, ValueError, "5 labels for 6 images"),
        ({"x": torch.zeros(6, 3, 32, 32, dtype=torch.uint8)}, TypeError, "floating point"),
        ({"carriers": None}, TypeError, "carriers must be a tensor"),
    ],
)
def test_what_cannot_be_injected_is_refused(change, error, message):
    good = {"x": images(), "y": torch.arange(6), "carriers": carriers(10, (3, 32, 32)), "beta": BETA}
    with pytest.raises(error, match=message):
        inject(**{**good, **change})


def mode_of(r, c, height, width):
    """A product of two cosines of the DCT, (H, W)."""
    m, n = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    return torch.cos((2 * m + 1) * r * math.pi / (2 * height)) * torch.cos((2 * n + 1) * c * math.pi / (2 * width))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (6, 9)])
def test_the_filter_keeps_low_frequencies_of_both_axes_and_no_others(height, width):
    for r in range(height):
        for c in range(width):
            wave = mode_of(r, c, height, width).expand(1, 2, -1, -1)
            expected = wave if r < 4 and c < 4 else torch.zeros_like(wave)
            torch.testing.assert_close(low_pass(wave, 4), expected, rtol=0, atol=1e-13)


def test_the_filter_is_idempotent_and_keeps_the_shape_of_one_image():
    for x in (images(1, dtype=torch.float64), images(4, dtype=torch.float64), images(1, dtype=torch.float64)[0]):
        once = low_pass(x, 5)
        assert once.shape == x.shape
        assert (once - x).abs().max() > 0.01
        torch.testing.assert_close(low_pass(once, 5), once, rtol=0, atol=1e-13)
        torch.testing.assert_close(low_pass(x, 32), x, rtol=0, atol=1e-13)
    assert low_pass(images(2), 5).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "cutoff", "error"), [(images(), 0, ValueError), (images(), 33, ValueError), (images().int(), 4, TypeError)]
)
def test_a_filter_that_cannot_be_is_refused(x, cutoff, error):
    with pytest.raises(error):
        low_pass(x, cutoff)
