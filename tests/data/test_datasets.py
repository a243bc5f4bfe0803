"""Data sets by name: splits that never overlap, untouched test data, torchvision's archives."""

import hashlib
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

import at_extensions.data.datasets as datasets
from at_extensions.data import ImageSplit, load_dataset, long_tail_counts


def bytes_of(split):
    return [image.numpy().tobytes() for image in split.images]


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", val_fraction=0)


@pytest.fixture
def toy(monkeypatch):
    """Let "digits" name 4 classes of given sizes, whose image i holds the number i in its bytes."""

    def install(sizes):
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        number = torch.arange(2 * len(labels))
        images = torch.stack([number // 256, number % 256], 1).byte().reshape(-1, 1, 1, 2)
        whole = ImageSplit(images, labels.repeat(2), len(sizes), "toy")
        half = torch.arange(len(labels))
        monkeypatch.setattr(
            datasets, "_read_digits", lambda: {"train": whole.select(half), "test": whole.select(half + len(labels))}
        )

    return install


def test_digits_are_scikit_learns_scans():
    from sklearn.datasets import load_digits

    original = load_digits()
    splits = load_dataset("digits")
    scans = {(image / 16).astype(np.float32).tobytes(): label for image, label in zip(original.images, original.target)}
    seen = 0
    for split in (splits.train, splits.val, splits.test):
        images, labels = split.tensors()
        sixteenths = (images * 16).round() / 16
        assert (images - sixteenths).abs().max() <= 0.5 / 255 + 1e-6
        assert all(scans[scan.numpy().tobytes()] == label for scan, label in zip(sixteenths, labels))
        seen += len(split)
    assert seen == len(original.target) == 1797


@settings(deadline=None, max_examples=15)
@given(
    fraction=st.sampled_from([0.01, 0.1, 0.3, 0.7]),
    ratio=st.sampled_from([None, 0.1, 0.5, 1.0]),
    noise=st.sampled_from([None, 0.4, (0.3, "other")]),
    seed=st.integers(0, 1000),
)
def test_splits_are_disjoint_and_validation_is_balanced_and_clean(digits, fraction, ratio, noise, seed):
    splits = load_dataset("digits", val_fraction=fraction, imbalance_ratio=ratio, label_noise=noise, seed=seed)
    truth = dict(zip(bytes_of(digits.train), digits.train.labels.tolist()))
    train, val = bytes_of(splits.train), bytes_of(splits.val)
    assert len(set(train) | set(val)) == len(train) + len(val)
    assert set(train) | set(val) <= set(truth)
    assert len(set(splits.val.class_counts)) == 1
    assert [truth[image] for image in val] == splits.val.labels.tolist() == splits.val.clean_labels.tolist()
    assert [truth[image] for image in train] == splits.train.clean_labels.tolist()
    assert torch.equal(splits.test.images, digits.test.images)
    assert torch.equal(splits.test.labels, digits.test.labels)
    assert splits.class_counts == torch.bincount(splits.train.labels, minlength=10).tolist()
    if noise is None:
        assert torch.equal(splits.train.labels, splits.train.clean_labels)
    if ratio is None:
        assert len(train) + len(val) == len(truth)
    else:
        kept = torch.bincount(splits.train.clean_labels).tolist()
        assert kept == long_tail_counts(kept[0], 10, ratio)


def test_each_random_choice_leaves_the_others_as_they_are(digits):
    plain = load_dataset("digits", seed=3)
    noisy = load_dataset("digits", seed=3, label_noise=0.5)
    tailed = load_dataset("digits", seed=3, imbalance_ratio=0.2)
    assert bytes_of(plain.val) == bytes_of(noisy.val) == bytes_of(tailed.val)
    assert bytes_of(plain.train) == bytes_of(noisy.train)
    assert not torch.equal(plain.train.labels, noisy.train.labels)
    assert set(bytes_of(tailed.train)) < set(bytes_of(plain.train))
    smaller = load_dataset("digits", seed=3, imbalance_ratio=0.1)
    assert set(bytes_of(smaller.train)) < set(bytes_of(tailed.train))
    assert set(bytes_of(load_dataset("digits", seed=4).val)) != set(bytes_of(plain.val))


def test_loading_is_deterministic_and_touches_no_global_state():
    options = {"imbalance_ratio": 0.1, "label_noise": 0.3, "seed": 5}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    first, second = load_dataset("digits", **options), load_dataset("digits", **options)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert states == after
    for one, two in ((first.train, second.train), (first.val, second.val), (first.test, second.test)):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)


def test_without_validation_a_balanced_set_has_the_papers_counts(toy):
    toy([500] * 10)
    splits = load_dataset("digits", val_fraction=0, imbalance_ratio=0.02)
    assert splits.val is None
    assert splits.class_counts == long_tail_counts(500, 10, 0.02)
    assert splits.test.class_counts == [500] * 10
    with_val = load_dataset("digits", val_fraction=0.1, imbalance_ratio=0.02)
    assert with_val.val.class_counts == [50] * 10
    assert with_val.class_counts == long_tail_counts(450, 10, 0.02)


def test_unequal_classes_get_the_ratio_that_was_asked_for(toy):
    toy([60, 90, 33, 200])
    splits = load_dataset("digits", val_fraction=0.1, imbalance_ratio=0.125)
    assert splits.val.class_counts == [3] * 4
    assert splits.class_counts == long_tail_counts(57, 4, 0.125)  # class 0 is what limits the profile
    splits = load_dataset("digits", val_fraction=0, imbalance_ratio=0.5, imbalance_kind="step")
    assert splits.class_counts == [60, 60, 30, 30]


def test_label_noise_reports_what_it_changed(toy):
    toy([500] * 4)
    splits = load_dataset("digits", label_noise=(0.4, "other"))
    wrong = (splits.train.labels != splits.train.clean_labels).float().mean().item()
    assert wrong == pytest.approx(0.4, abs=0.05)
    assert splits.to_dict()["corrupted_labels"] == round(wrong * len(splits.train))
    uniform = load_dataset("digits", label_noise=0.4).train
    assert (uniform.labels != uniform.clean_labels).float().mean().item() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name_or_path": "cifar_10"}, ValueError, "unknown data set 'cifar_10'; did you mean 'cifar10'"),
        ({"name_or_path": "mnist"}, ValueError, "unknown data set 'mnist'"),
        ({"name_or_path": "npz:"}, ValueError, "npz:PATH"),
        ({"val_fraction": 1.0}, ValueError, r"val_fraction must lie in \[0, 1\)"),
        ({"val_fraction": -0.1}, ValueError, "val_fraction"),
        ({"val_fraction": "0.1"}, TypeError, "val_fraction"),
        ({"val_fraction": 0.999}, ValueError, "smallest class of digits has 140 .* takes 140: .*one left"),
        ({"val_fraction": 0.001}, ValueError, "takes 0: at least one must be taken"),
        ({"imbalance_ratio": 0.0}, ValueError, r"imbalance_ratio must lie in \(0, 1\]"),
        ({"imbalance_ratio": 2}, ValueError, r"imbalance_ratio must lie in \(0, 1\]"),
        ({"imbalance_ratio": 0.001}, ValueError, "without samples"),
        ({"imbalance_ratio": 0.1, "imbalance_kind": "linear"}, ValueError, "unknown imbalance kind"),
        ({"label_noise": 1.5}, ValueError, "label noise rate"),
        ({"label_noise": (0.1, "others")}, ValueError, "did you mean 'other'"),
        ({"label_noise": (0.1,)}, ValueError, "rate or .rate, kind."),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        load_dataset(**{"name_or_path": "digits", **options})


def test_classes_too_small_for_validation_are_named(toy):
    toy([50, 2, 50])
    with pytest.raises(ValueError, match="smallest class of toy has 2 training samples"):
        load_dataset("digits")
    assert load_dataset("digits", val_fraction=0).class_counts == [50, 2, 50]


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def fake_cifar(monkeypatch, root, dataset, label_key, names, parts):
    """Write archives in CIFAR's format and let torchvision expect their digests; return the images and labels."""
    rng = np.random.default_rng(0)
    written = {}
    for role in ("train", "test"):
        rows, labels, files = [], [], []
        for part in parts[role]:
            data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
            digest = write_pickle(
                root / dataset.base_folder / part, {"data": data, label_key: [i % len(names) for i in range(20)]}
            )
            rows.append(data)
            labels += [i % len(names) for i in range(20)]
            files.append([part, digest])
        monkeypatch.setattr(dataset, f"{role}_list", files)
        written[role] = np.concatenate(rows).reshape(-1, 3, 32, 32), labels
    meta = dict(dataset.meta)
    meta["md5"] = write_pickle(root / dataset.base_folder / meta["filename"], {meta["key"]: names})
    monkeypatch.setattr(dataset, "meta", meta)
    return written


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archives_are_read_through_torchvision(tmp_path, monkeypatch, name):
    if name == "cifar10":
        parts = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        written = fake_cifar(monkeypatch, tmp_path, CIFAR10, "labels", ["plane", "car", "bird", "cat"], parts)
    else:
        parts = {"train": ["train"], "test": ["test"]}
        written = fake_cifar(monkeypatch, tmp_path, CIFAR100, "fine_labels", ["apple", "fish", "baby", "bear"], parts)
    splits = load_dataset(name, root=tmp_path, val_fraction=0)
    for role, split in (("train", splits.train), ("test", splits.test)):
        assert np.array_equal(split.images.numpy(), written[role][0])
        assert split.labels.tolist() == written[role][1]
    assert splits.num_classes == len(splits.class_names) == 4
    assert splits.name == name


def test_svhn_archives_are_read_through_torchvision(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    written, files = {}, {}
    for role, size in (("train", 60), ("test", 20)):
        images, labels = rng.integers(0, 256, (32, 32, 3, size), dtype=np.uint8), np.arange(size) % 10 + 1
        path = tmp_path / f"{role}_32x32.mat"
        savemat(path, {"X": images, "y": labels[:, None]})
        files[role] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
        written[role] = images.transpose(3, 2, 0, 1), labels % 10  # the archive calls the digit 0 "10"
    monkeypatch.setattr(SVHN, "split_list", files)
    splits = load_dataset("svhn", root=tmp_path, val_fraction=0.5)
    assert np.array_equal(splits.test.images.numpy(), written["test"][0])
    assert splits.test.labels.tolist() == written["test"][1].tolist()
    assert splits.val.class_counts == splits.class_counts == [3] * 10


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_missing_archives_say_how_to_get_them(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name.upper()} is missing .*download=True\)"):
        load_dataset(name, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_foreign_archives_are_never_unpickled(tmp_path):
    loaded = tmp_path / "loaded"

    class Trap:
        def __reduce__(self):
            return open, (str(loaded), "w")

    for part in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        write_pickle(tmp_path / "cifar-10-batches-py" / part, Trap())
    with pytest.raises(FileNotFoundError, match="missing or damaged"):
        load_dataset("cifar10", root=tmp_path)
    assert not loaded.exists()
