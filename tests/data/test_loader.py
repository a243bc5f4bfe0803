"""Loaders: every sample once an epoch, the same batches from the same seed, ranks that add up to one process."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at_extensions.data import FloatSplit, ImageSplit, make_loader


def split_of(n, channels=1, side=8, num_classes=3):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, channels, side, side), generator=generator).byte()
    return ImageSplit(images, torch.randint(0, num_classes, (n,), generator=generator), num_classes)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def same_batches(left, right):
    pairs = list(itertools.zip_longest(left, right))
    return bool(pairs) and all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 16),
    shuffle=st.booleans(),
    augment=st.sampled_from(["none", "crop", "crop_flip"]),
)
def test_every_index_comes_exactly_once_an_epoch(n, batch_size, shuffle, augment):
    split = split_of(n)
    loader = make_loader(split, batch_size, shuffle=shuffle, augment=augment, generator=seeded(n))
    batches = list(loader)
    index = torch.cat([batch[2] for batch in batches])
    assert len(batches) == len(loader)
    assert sorted(index.tolist()) == list(range(n))
    assert torch.equal(torch.cat([batch[1] for batch in batches]), split.labels[index])
    assert all(len(batch[0]) == batch_size for batch in batches[:-1])
    if not shuffle:
        assert index.tolist() == list(range(n))


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 6),
    world_size=st.integers(1, 5),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_ranks_together_are_one_process_with_the_joint_batch(n, batch_size, world_size, shuffle, drop_last):
    joint_size = batch_size * world_size
    if drop_last:
        n = max(n, joint_size)
    split = split_of(n)
    options = {"shuffle": shuffle, "drop_last": drop_last, "augment": "crop_flip"}
    joint = list(make_loader(split, joint_size, generator=seeded(1), **options))
    ranks = [
        list(make_loader(split, batch_size, generator=seeded(1), rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(joint)}
    for step, (x, y, index) in enumerate(joint):
        parts = [batches[step] for batches in ranks]
        sizes = [len(part[2]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        if len(index) >= world_size:
            assert torch.equal(torch.cat([part[0] for part in parts]), x)
            assert torch.equal(torch.cat([part[1] for part in parts]), y)
            assert torch.equal(torch.cat([part[2] for part in parts]), index)
        else:  # some repeat, so that no rank waits
            assert {int(part[2]) for part in parts} == set(index.tolist())


def test_images_are_the_bytes_over_255():
    split = split_of(20)
    for x, _, index in make_loader(split, 7, generator=seeded(0)):
        assert x.dtype == torch.float32
        assert torch.equal(x, split.images[index].float() / 255)


def test_augmented_images_are_crops_of_their_sample():
    split = split_of(30, channels=3, side=16)
    loader = make_loader(split, 8, augment="crop_flip", generator=seeded(5))
    padded = torch.nn.functional.pad(split.images, [2] * 4)
    moved = mirrored = 0
    for x, _, index in loader:
        for image, i in zip(x, index):
            views = {
                (top, left, flip): crop.flip(-1) if flip else crop
                for top, left, flip in itertools.product(range(5), range(5), (False, True))
                for crop in [padded[i, :, top : top + 16, left : left + 16].float() / 255]
            }
            hits = [where for where, view in views.items() if torch.equal(view, image)]
            assert len(hits) == 1
            moved += hits[0][:2] != (2, 2)
            mirrored += hits[0][2]
    assert moved > 15
    assert 5 < mirrored < 25


def test_crop_never_mirrors():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., 2:6, 2:4] = 100
    image[..., 2:6, 4:6] = 200  # bright on the right, whatever the crop
    split = ImageSplit(image.repeat(64, 1, 1, 1), torch.zeros(64).long(), 2)

    def bright_on_the_right(augment):
        x, _, _ = next(iter(make_loader(split, 64, augment=augment, generator=seeded(0))))
        columns = torch.arange(8.0)
        return ((x == 200 / 255).float().sum((1, 2)) @ columns) / 8 > (
            (x == 100 / 255).float().sum((1, 2)) @ columns
        ) / 8

    assert bright_on_the_right("crop").all()
    assert not bright_on_the_right("crop_flip").all()


def test_the_same_seed_gives_the_same_batches_and_another_does_not():
    split = split_of(50)
    loaders = [make_loader(split, 8, augment="crop_flip", generator=seeded(s)) for s in (7, 7, 8)]
    first, second = list(loaders[0]), list(loaders[0])
    assert same_batches(first, loaders[1])
    assert same_batches(second, loaders[1])
    assert not same_batches(first, second)
    assert not same_batches(first, loaders[2])
    assert same_batches(make_loader(split, 8), make_loader(split, 8, generator=seeded(0)))


@settings(deadline=None, max_examples=20)
@given(done=st.integers(0, 3), augment=st.sampled_from(["none", "crop", "crop_flip"]), seed=st.integers(0, 99))
def test_a_resumed_loader_continues_as_the_uninterrupted_one(done, augment, seed):
    split = split_of(13)
    whole = make_loader(split, 4, augment=augment, generator=seeded(seed))
    for _ in range(done):
        list(whole)
    state = whole.state_dict()
    later = [list(whole) for _ in range(2)]
    resumed = make_loader(split, 4, augment=augment, generator=seeded(seed + 1))
    resumed.load_state_dict(state)
    assert all(same_batches(epoch, resumed) for epoch in later)


def test_an_epoch_is_drawn_at_its_start():
    split = split_of(20)
    broken, whole = (make_loader(split, 4, augment="crop_flip", generator=seeded(2)) for _ in range(2))
    next(iter(broken))  # an epoch left after one batch
    list(whole)
    assert same_batches(broken, whole)


def test_making_batches_touches_no_global_state_and_no_data():
    split = split_of(20)
    images, labels = split.images.clone(), split.labels.clone()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    for x, y, index in make_loader(split, 6, augment="crop_flip"):
        x.zero_()
        y.zero_()
        index.zero_()
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert states == after
    assert torch.equal(split.images, images)
    assert torch.equal(split.labels, labels)


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_no_batch_needs_a_value_on_the_host(augment):
    """On the meta device tensors have no values, so reading one (a host synchronisation on a GPU) would raise."""
    loader = make_loader(split_of(20), 6, augment=augment, generator=seeded(0), device="meta")
    shapes = [(tuple(x.shape), tuple(y.shape), tuple(index.shape)) for x, y, index in loader]
    assert shapes == [((b, 1, 8, 8), (b,), (b,)) for b in (6, 6, 6, 2)]


def test_drop_last_drops_and_length_tells():
    split = split_of(20)
    loader = make_loader(split, 6, drop_last=True)
    assert [len(y) for _, y, _ in loader] == [6, 6, 6]
    assert len(loader) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split": [1, 2, 3]}, TypeError, "ImageSplit"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 2.0}, TypeError, "batch_size"),
        ({"augment": "cropflip"}, ValueError, "did you mean 'crop_flip'"),
        ({"rank": 2, "world_size": 2}, ValueError, r"rank must lie in \[0, 2\)"),
        ({"world_size": 0}, ValueError, "world_size"),
        ({"batch_size": 6, "world_size": 2, "drop_last": True}, ValueError, "10 samples, not enough for .* 6 x 2"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        make_loader(**{"split": split_of(10), "batch_size": 2, **change})


def test_a_foreign_state_is_refused():
    with pytest.raises(ValueError, match=r"holds 'generator' alone, got \['epoch'\]"):
        make_loader(split_of(10), 2).load_state_dict({"epoch": torch.tensor(1)})


def test_crops_of_images_whose_range_does_not_hold_zero_are_refused():
    split = FloatSplit(torch.full((4, 1, 8, 8), 0.5), torch.tensor([0, 1, 0, 1]), 2, image_range=(0.2, 0.8))
    assert len(list(make_loader(split, 2))) == 2
    with pytest.raises(ValueError, match="pad images by zeros"):
        make_loader(split, 2, augment="crop")
