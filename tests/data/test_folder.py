"""Image folders: numbered as timm does, decoded into [0, 1], batches that do not depend on the workers."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import to_tensor

from at_extensions.data import load_dataset, make_loader

CLASSES = ("ant", "bee", "cat")


def write_images(folder, sizes, seed=0, classes=CLASSES):
    """PNG files of coarse random squares, 24 x 20 pixels."""
    rng = np.random.default_rng(seed)
    for name, size in zip(classes, sizes):
        (folder / name).mkdir(parents=True)
        for i in range(size):
            squares = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
            Image.fromarray(squares.repeat(4, 0).repeat(4, 1)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    path = tmp_path_factory.mktemp("insects")
    write_images(path / "train", (8, 6, 10))
    write_images(path / "val", (2, 2, 2), seed=1)
    return path


@pytest.fixture(scope="module")
def splits(tree):
    return load_dataset(f"folder:{tree}", val_fraction=0.34, image_size=16)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def same_batches(left, right):
    pairs = list(itertools.zip_longest(left, right))
    return bool(pairs) and all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


def test_splits_hold_every_file_once(tree, splits):
    drawn = splits.train.files + splits.val.files
    assert sorted(drawn) == sorted(str(file) for file in tree.glob("train/*/*.png"))
    assert sorted(splits.test.files) == sorted(str(file) for file in tree.glob("val/*/*.png"))
    assert splits.val.class_counts == [2, 2, 2]
    assert (splits.class_counts, splits.class_names, splits.image_shape) == ([6, 4, 8], CLASSES, (3, 16, 16))
    for split in (splits.train, splits.val, splits.test):
        assert [CLASSES[label] for label in split.labels] == [file.split("/")[-2] for file in split.files]


def test_images_are_the_resized_middle(splits):
    for i in range(3):
        image, label = splits.test[i]
        original = Image.open(splits.test.files[i])
        # timm: the shorter side to 16 / 0.875 = 18 pixels, then the middle 16 x 16
        resized = original.resize((18, 21), Image.Resampling.BILINEAR)
        middle = to_tensor(resized)[:, round((21 - 16) / 2) :, 1:][:, :16, :16]
        assert torch.equal(image, middle)
        assert label == splits.test.labels[i]
    images, labels = splits.test.tensors(3)
    assert torch.equal(images, torch.stack([splits.test[i][0] for i in range(3)]))
    assert labels.tolist() == splits.test.labels[:3].tolist()


def test_tails_noise_and_subsets_work_as_in_memory(tree):
    tailed = load_dataset(f"folder:{tree}", val_fraction=0, imbalance_ratio=0.5, label_noise=(1.0, "other"))
    assert torch.bincount(tailed.train.clean_labels).tolist() == [8, 5, 4]
    assert (tailed.train.labels != tailed.train.clean_labels).all()
    assert [CLASSES[label] for label in tailed.train.clean_labels] == [f.split("/")[-2] for f in tailed.train.files]
    assert tailed.image_shape == (3, 224, 224)
    assert load_dataset(f"folder:{tree}", val_fraction=0).train.subset(9).class_counts == [3, 3, 3]


def test_batches_without_augmentation_are_the_samples(splits):
    seen = []
    for x, y, index in make_loader(splits.train, 7, generator=seeded(0), workers=2):
        assert torch.equal(x, torch.stack([splits.train[i][0] for i in index]))
        assert torch.equal(y, splits.train.labels[index])
        seen += index.tolist()
    assert sorted(seen) == list(range(len(splits.train)))


def test_augmented_batches_do_not_depend_on_workers_or_ranks(splits):
    options = {"augment": "crop_flip"}
    states = random.getstate(), torch.get_rng_state().tolist()
    joint = list(make_loader(splits.train, 8, generator=seeded(3), workers=1, **options))
    assert (random.getstate(), torch.get_rng_state().tolist()) == states
    assert same_batches(joint, make_loader(splits.train, 8, generator=seeded(3), workers=2, **options))
    assert not same_batches(joint, make_loader(splits.train, 8, generator=seeded(4), workers=1, **options))
    ranks = [
        list(make_loader(splits.train, 4, generator=seeded(3), rank=rank, world_size=2, workers=1, **options))
        for rank in (0, 1)
    ]
    assert same_batches(joint, [[torch.cat(pair) for pair in zip(*parts)] for parts in zip(*ranks)])
    assert all(x.min() >= 0 and x.max() <= 1 and x.dtype == torch.float32 for x, _, _ in joint)


def test_augmentation_differs_from_epoch_to_epoch_and_resumes(splits):
    loader = make_loader(splits.train, 18, augment="crop", generator=seeded(0), shuffle=False, workers=1)
    first = list(loader)
    state = loader.state_dict()
    second = list(loader)
    assert torch.equal(first[0][2], second[0][2])
    assert (first[0][0] != second[0][0]).flatten(1).any(1).all()
    resumed = make_loader(splits.train, 18, augment="crop", generator=seeded(9), shuffle=False, workers=1)
    resumed.load_state_dict(state)
    assert same_batches(second, resumed)


def test_crop_flip_mirrors_half_of_the_images(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], (32, 32, 3))  # brighter to the right
    for name in ("train/a", "train/b", "val/a"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / name / f"{i}.png")
    train = load_dataset(f"folder:{tmp_path}", val_fraction=0, image_size=8).train

    def brighter_to_the_right(augment):
        x, _, _ = next(iter(make_loader(train, 40, augment=augment, workers=1)))
        return (x[..., -1].mean((1, 2)) > x[..., 0].mean((1, 2))).float().mean().item()

    assert brighter_to_the_right("crop") == 1
    assert 0.2 < brighter_to_the_right("crop_flip") < 0.8


def test_a_validation_folder_beside_test_is_used_as_it_is(tmp_path):
    for role, sizes in (("train", (3, 3)), ("val", (1, 2)), ("test", (2, 2))):
        write_images(tmp_path / role, sizes)
    splits = load_dataset("folder:.", root=tmp_path)
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [6, 3, 4]
    assert all("/val/" in file for file in splits.val.files)


def test_classes_are_numbered_by_the_training_folders(tmp_path):
    write_images(tmp_path / "train", (2, 2, 2))
    write_images(tmp_path / "test", (2,), classes=("cat",))
    assert load_dataset(f"folder:{tmp_path}", val_fraction=0).test.labels.tolist() == [2, 2]
    write_images(tmp_path / "val", (1, 1), classes=("cat", "dog"))
    with pytest.raises(ValueError, match=r"val has classes that .*train lacks: \['dog'\]"):
        load_dataset(f"folder:{tmp_path}")


def test_a_broken_image_is_named(tmp_path):
    for role in ("train", "val"):
        write_images(tmp_path / role, (1, 1))
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"not a picture")
    train = load_dataset(f"folder:{tmp_path}", val_fraction=0, image_size=8).train
    with pytest.raises(UnidentifiedImageError, match=r"ant/0\.png"):
        train[0]
    with pytest.raises(UnidentifiedImageError, match=r"ant/0\.png"):
        list(make_loader(train, 2, workers=1))


def test_folders_that_do_not_fit_are_named(tmp_path, tree, splits):
    with pytest.raises(FileNotFoundError, match=r"must hold the folders train and val .*found none of them"):
        load_dataset(f"folder:{tmp_path / 'nowhere'}")
    write_images(tmp_path / "train", (1, 1))
    with pytest.raises(FileNotFoundError, match=r"found \['train'\]"):
        load_dataset(f"folder:{tmp_path}")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="val holds no images"):
        load_dataset(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        load_dataset(f"folder:{tree}", image_size=0)
    with pytest.raises(ValueError, match="image_size is for folder:PATH; digits"):
        load_dataset("digits", image_size=32)
    with pytest.raises(ValueError, match="images in memory need none"):
        make_loader(load_dataset("digits").val, 10, workers=2)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        make_loader(splits.val, 10, workers=0)
