"""Crop and flip of a batch against a loop over its images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at_extensions.data.augment import CropFlip


def slow_crop_flip(image, padding, top, left, flip):
    """One image (C, H, W), pixel by pixel."""
    height, width = image.shape[1:]
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            source_row = top + row - padding
            source_column = left + (width - 1 - column if flip else column) - padding
            if 0 <= source_row < height and 0 <= source_column < width:
                out[:, row, column] = image[:, source_row, source_column]
    return out


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(2, 17), st.integers(2, 9)),
    start=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_batch_equals_the_loop_over_its_images(shape, start, flip, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, shape, generator=generator).byte()
    draws = CropFlip.draw(shape[0] + start, shape[2], flip=flip, generator=generator, device=torch.device("cpu"))
    got = draws.apply(images, start)
    for i, image in enumerate(images):
        mirrored = flip and bool(draws.flip[start + i])
        top, left = int(draws.top[start + i]), int(draws.left[start + i])
        assert torch.equal(got[i], slow_crop_flip(image, draws.padding, top, left, mirrored))


@pytest.mark.parametrize(("height", "padding"), [(32, 4), (8, 1), (28, 3), (64, 8), (4, 1)])
def test_padding_is_an_eighth_of_the_height(height, padding):
    draws = CropFlip.draw(4, height, flip=False, generator=torch.Generator(), device=torch.device("cpu"))
    assert draws.padding == padding


def test_every_offset_and_both_sides_are_equally_likely():
    draws = CropFlip.draw(45000, 32, flip=True, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    for offsets in (draws.top, draws.left):
        assert (torch.bincount(offsets, minlength=9) / 5000).tolist() == pytest.approx([1.0] * 9, abs=0.06)
    assert draws.flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    joint = torch.bincount(draws.top * 9 + draws.left, minlength=81)
    assert joint.min() > 400  # of 556 expected: rows and columns are drawn independently
