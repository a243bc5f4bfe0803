"""Data sets with injected features: the same patterns in every split, and a control without meaning."""

import pytest
import torch

from at_extensions.data import (
    FloatSplit,
    FolderSplit,
    ImageSplit,
    Injection,
    carriers,
    inject,
    injected_range,
    load_dataset,
    make_loader,
)

BETA = 8 / 255


def toy(n=40, shape=(3, 8, 8), num_classes=4, **options):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, *shape), generator=generator).byte()
    return ImageSplit(images, torch.arange(n) % num_classes, num_classes, **options)


def test_train_val_and_test_get_the_pattern_of_their_class():
    plain, found = load_dataset("digits", seed=3), load_dataset("digits", seed=3, inject=Injection(BETA))
    patterns = carriers(10, (1, 8, 8))
    for role in ("train", "val", "test"):
        before, after = getattr(plain, role), getattr(found, role)
        x, y = before.tensors()
        assert torch.equal(after.images, inject(x, y, patterns, BETA))
        assert torch.equal(after.labels, before.labels)
        assert after.image_range == injected_range(patterns, BETA)
    assert found.image_range == pytest.approx((-BETA, 1 + BETA))
    assert found.to_dict() == plain.to_dict() | {"image_range": list(found.image_range)}
    assert "range of values: -0.03137 to 1.031" in repr(found)


def test_the_pattern_is_that_of_the_true_class_whatever_became_of_the_label():
    labels = torch.arange(40).flip(0) % 4
    split = toy(clean_labels=labels)
    assert not torch.equal(split.labels, labels)
    found = Injection(BETA).into_split(split, 0)
    assert torch.equal(found.images, inject(split.tensors()[0], labels, carriers(4, (3, 8, 8)), BETA))
    assert torch.equal(found.labels, split.labels)


def test_large_splits_are_injected_image_by_image():
    split = toy(2500)
    found = Injection(BETA, "orthogonal").into_split(split, 0)
    index = torch.tensor([0, 999, 1000, 1001, 2499])
    x, y = split.select(index).tensors()
    expected = inject(x, y, carriers(4, (3, 8, 8)), BETA, mode="orthogonal")
    torch.testing.assert_close(found.select(index).images, expected, rtol=0, atol=1e-6)


def numbers(split, found):
    """The number of each image's carrier."""
    patterns = carriers(split.num_classes, split.image_shape).flatten(1)
    return ((found.images - split.tensors()[0]).flatten(1) @ patterns.T).argmax(1)


def test_permuted_patterns_are_all_used_and_say_nothing_of_the_class():
    split = toy(4000)
    found = Injection(BETA, permuted=True).into_split(split, 0)
    drawn = numbers(split, found)
    counts = torch.zeros(4, 4).index_put((split.labels, drawn), torch.ones(4000), accumulate=True)
    assert counts.sum() == 4000
    assert ((counts - 250).abs() < 5 * (250 * 0.75) ** 0.5).all()
    assert torch.equal(drawn, numbers(split, Injection(BETA, permuted=True).into_split(split, 0)))
    for other in (Injection(BETA, permuted=True, seed=1).into_split(split, 0),
                  Injection(BETA, permuted=True).into_split(split, 2)):  # fmt: skip
        assert (numbers(split, other) == drawn).float().mean() < 0.3
    assert torch.equal(numbers(split, Injection(BETA).into_split(split, 0)), split.labels)


def test_a_record_gives_the_injection_back():
    record = {"inject_beta": BETA, "inject_mode": "reverse", "inject_permuted": True, "inject_seed": 3}
    assert Injection.recorded(record) == Injection(BETA, "reverse", True, 3)
    assert Injection.recorded({"name": "digits"}) is None


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_batches_keep_what_is_outside_the_unit_interval(augment):
    found = Injection(BETA).into_split(toy(), 0)
    loader = make_loader(found, 8, augment=augment, generator=torch.Generator().manual_seed(0))
    assert loader.image_range == found.image_range
    batches = list(loader)
    x, y, index = (torch.cat(part) for part in zip(*batches))
    assert torch.equal(y, found.labels[index])
    assert x.dtype == torch.float32
    if augment == "none":
        assert torch.equal(x, found.images[index])
    assert x.min() < 0
    assert x.max() > 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 8}, ValueError, "did you mean 8/255"),
        ({"beta": "8/255"}, TypeError, "beta must be a number"),
        ({"beta": BETA, "mode": "plus"}, ValueError, "unknown mode 'plus'"),
        ({"beta": BETA, "seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_an_injection_that_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Injection(**options)


def test_images_that_allow_no_such_features_are_refused():
    with pytest.raises(ValueError, match="even number of pixels, got 7"):
        Injection(BETA).into_split(toy(shape=(3, 8, 7)), 0)
    with pytest.raises(ValueError, match="at most 6 classes, got 8"):
        Injection(BETA).into_split(toy(shape=(3, 2, 2), num_classes=8), 0)
    files = FolderSplit(["a.png", "b.png"], torch.tensor([0, 1]), 2)
    with pytest.raises(TypeError, match="in memory; folder decodes its images from files"):
        Injection(BETA).into_split(files, 0)
    twice = Injection(BETA).into_split(toy(), 0)
    with pytest.raises(ValueError, match=r"into images in \[0, 1\]"):
        Injection(BETA).into_split(twice, 0)
    assert isinstance(twice, FloatSplit)
