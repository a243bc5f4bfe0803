"""Splits: samples with a stable index, balanced subsets, seeded shuffles of each class."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at_extensions.data import FloatSplit, ImageSplit, Splits
from at_extensions.data.split import ranks_in_class, seeded_generator


def numbered(labels, num_classes=None, **options):
    """A split whose image i holds the bytes of the number i."""
    labels = torch.tensor(labels)
    number = torch.arange(len(labels))
    images = torch.stack([number // 256, number % 256], 1).byte().reshape(-1, 1, 1, 2)
    return ImageSplit(images, labels, num_classes or int(labels.max()) + 1, **options)


def numbers(split):
    """The numbers that a split's images hold."""
    return (split.images.long().flatten(1) * torch.tensor([256, 1])).sum(1).tolist()


def test_samples_are_images_in_unit_interval_with_their_label():
    split = ImageSplit(torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(2, 1, 1, 2), torch.tensor([1, 0]), 2)
    image, label = split[0]
    assert image.tolist() == [[[0.0, pytest.approx(0.2)]]]
    assert label == 1
    assert [label for _, label in split] == [1, 0]
    images, labels = split.tensors()
    assert torch.equal(images, split.images.float() / 255)
    assert torch.equal(labels, split.labels)
    assert torch.equal(split.tensors(1)[0][0], image)


def test_a_dataloader_of_torch_takes_a_split_as_it_is():
    split = numbered([0, 1, 2, 0, 1])
    images, labels = next(iter(torch.utils.data.DataLoader(split, batch_size=5)))
    assert torch.equal(images, split.tensors()[0])
    assert torch.equal(labels, split.labels)


def test_changing_handed_out_tensors_leaves_the_split_alone():
    split = numbered([0, 1, 1])
    images, labels = split.tensors()
    images.fill_(1)
    labels.fill_(0)
    split[1][0].fill_(1)
    assert numbers(split) == [0, 1, 2]
    assert split.labels.tolist() == [0, 1, 1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.data())
def test_a_subset_is_as_balanced_as_its_classes_allow(labels, data):
    split = numbered([*labels, 4])
    n = data.draw(st.integers(1, len(split)))
    seed = data.draw(st.integers(0, 3))
    subset = split.subset(n, seed)
    chosen = numbers(subset)
    assert len(chosen) == len(set(chosen)) == n
    assert chosen == sorted(chosen)
    assert subset.labels.tolist() == [split.labels[i] for i in chosen]
    most = max(subset.class_counts)
    for got, there in zip(subset.class_counts, split.class_counts):
        assert got >= min(there, most - 1)  # a class falls behind the fullest one only when it is used up
    assert numbers(split.subset(n, seed)) == chosen
    if n < len(split):
        drawn, left = split.divide(n, seed)
        assert numbers(drawn) == chosen
        assert numbers(left) == sorted(set(range(len(split))) - set(chosen))


def test_a_split_is_not_divided_so_that_nothing_is_left():
    with pytest.raises(ValueError, match="leave none"):
        numbered([0, 1, 1]).divide(3)


def test_a_select_carries_clean_labels_and_names():
    split = numbered([0, 1, 1], class_names=("cat", "dog"), clean_labels=torch.tensor([0, 0, 1]), name="pets")
    part = split.select(torch.tensor([2, 1]))
    assert part.labels.tolist() == [1, 1]
    assert part.clean_labels.tolist() == [1, 0]
    assert (part.class_names, part.name, part.num_classes) == (("cat", "dog"), "pets", 2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 5))
def test_ranks_number_every_class_from_zero(labels, seed):
    ranks = ranks_in_class(torch.tensor(labels), 4, seeded_generator(seed))
    for c in set(labels):
        own = [int(r) for r, label in zip(ranks, labels) if label == c]
        assert sorted(own) == list(range(len(own)))


def test_ranks_are_a_fair_shuffle():
    labels = torch.tensor([0, 1, 0, 1, 0])
    generator = seeded_generator(0)
    first = torch.stack([ranks_in_class(labels, 2, generator) == 0 for _ in range(3000)]).float().mean(0)
    assert first.tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3], abs=0.05)


def test_streams_of_one_seed_are_independent():
    draws = {(s, k): torch.rand(4, generator=seeded_generator(s, k)) for s in (0, 1) for k in (0, 1)}
    assert all(not torch.equal(draws[a], draws[b]) for a in draws for b in draws if a < b)
    assert torch.equal(draws[0, 1], torch.rand(4, generator=seeded_generator(0, 1)))


def test_splits_read_as_a_table_and_as_numbers():
    train = numbered([0, 0, 0, 1], clean_labels=torch.tensor([0, 0, 1, 1]))
    splits = Splits(train, None, numbered([0, 1]), 2, train.class_counts, "toy")
    assert splits.to_dict() == {
        "name": "toy",
        "num_classes": 2,
        "image_shape": [1, 1, 2],
        "train_size": 4,
        "val_size": 0,
        "test_size": 2,
        "class_counts": [3, 1],
        "corrupted_labels": 1,
    }
    assert [line.split() for line in repr(splits).splitlines()[2:]] == [
        ["train", "4", "1", "to", "3"],
        ["val", "0"],
        ["test", "2", "1"],
        ["corrupted", "training", "labels:", "1"],
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.rand(3, 1, 2, 2)}, TypeError, "uint8"),
        ({"images": torch.zeros(3, 2, 2, dtype=torch.uint8)}, ValueError, r"\(N, C, H, W\)"),
        ({"images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8), "labels": torch.zeros(0).long()}, ValueError, "empty"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "2 labels for 3 images"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, "from 0 to 1"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, TypeError, "integer"),
        ({"clean_labels": torch.tensor([0, 1, 5])}, ValueError, "from 0 to 1"),
        ({"num_classes": 1}, ValueError, "at least 2"),
        ({"class_names": ("cat",)}, ValueError, "1 class names for 2 classes"),
    ],
)
def test_a_split_refuses_what_does_not_fit(change, error, message):
    good = {"images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8), "labels": torch.tensor([0, 1, 1]), "num_classes": 2}
    with pytest.raises(error, match=message):
        ImageSplit(**{**good, **change})


def test_more_samples_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="asked for 4 samples of images, which has 3"):
        numbered([0, 1, 1]).subset(4)
    with pytest.raises(ValueError, match="asked for 4"):
        numbered([0, 1, 1]).tensors(4)
    with pytest.raises(ValueError, match="at least 0"):
        numbered([0, 1, 1]).subset(2, seed=-1)


def floats(**change):
    images = torch.tensor([-0.1, 0.0, 1.0, 1.2]).reshape(2, 1, 1, 2)
    given = {"images": images, "labels": torch.tensor([1, 0]), "num_classes": 2, "image_range": (-0.1001, 1.2001)}
    return FloatSplit(**{**given, **change})


def test_float_images_come_as_they_are_and_cannot_be_changed_through_a_sample():
    split = floats()
    image, label = split[1]
    assert torch.equal(image, split.images[1])
    assert label == 0
    image.zero_()
    split.tensors(2)[0].zero_()
    assert split.images[1].flatten().tolist() == pytest.approx([1.0, 1.2])
    one = split.select(torch.tensor([1]))
    assert torch.equal(one.images, split.images[1:])
    assert one.image_range == split.image_range == (-0.1001, 1.2001)
    assert replace(split, labels=torch.tensor([0, 0])).image_range == split.image_range


def test_the_range_of_splits_holds_all_of_them():
    plain = numbered([0, 1])
    assert plain.image_range == (0.0, 1.0)
    assert Splits(floats(), None, plain, 2, [1, 1], "toy").image_range == (-0.1001, 1.2001)
    low = floats(images=torch.full((2, 1, 1, 2), 0.5), image_range=(0.25, 0.75))
    assert Splits(low, low, low, 2, [1, 1], "toy").image_range == (0.25, 0.75)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_range": (0, 1)}, ValueError, r"must lie in \[0, 1\], got \[-0.1, 1.2\]"),
        ({"image_range": (1, 0)}, ValueError, "image_range"),
        ({"image_range": 1}, TypeError, "image_range"),
        ({"images": torch.zeros(2, 1, 1, 2, dtype=torch.uint8)}, TypeError, "floating point"),
        ({"images": torch.zeros(2, 1, 1, 2, dtype=torch.float64)}, TypeError, "images.float()"),
        ({"images": torch.full((2, 1, 1, 2), float("nan"))}, ValueError, "not finite"),
        ({"labels": torch.tensor([0, 2])}, ValueError, "from 0 to 1"),
    ],
)
def test_a_float_split_refuses_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        floats(**change)
