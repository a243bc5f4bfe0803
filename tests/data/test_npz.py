"""Data sets in one npz file: what is read, and what each broken file is told."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from at_extensions.data import load_dataset, load_test


def arrays(n=40, side=4, channels=3, num_classes=4, val=False):
    """A well-formed data set; every image holds its own number in its first byte."""
    rng = np.random.default_rng(0)
    out = {}
    for role, size in (("train", n), ("val", n // 2 if val else 0), ("test", n // 2)):
        if size:
            images = rng.integers(0, 256, (size, side, side, channels), dtype=np.uint8)
            images[:, 0, 0, 0] = np.arange(size)
            out[f"{role}_images"], out[f"{role}_labels"] = images, np.arange(size) % num_classes
    return out


def saved(path, **changes):
    """Write the well-formed arrays with changes; None leaves a key out."""
    content = {**arrays(), **changes}
    np.savez(path / "set.npz", **{key: value for key, value in content.items() if value is not None})
    return f"npz:{path / 'set.npz'}"


def test_images_come_out_as_they_went_in(tmp_path):
    splits = load_dataset(saved(tmp_path), val_fraction=0)
    given = arrays()
    assert torch.equal(splits.train.images, torch.from_numpy(given["train_images"]).permute(0, 3, 1, 2))
    assert splits.train.images.is_contiguous()
    assert torch.equal(splits.test.labels, torch.from_numpy(given["test_labels"]))
    assert (splits.num_classes, splits.name, splits.val) == (4, "set", None)


def test_a_path_and_a_root_will_do(tmp_path):
    saved(tmp_path)
    by_path = load_dataset(tmp_path / "set.npz")
    by_root = load_dataset("npz:set.npz", root=tmp_path)
    assert torch.equal(by_path.train.images, by_root.train.images)


def test_its_own_validation_split_is_used_as_it_is(tmp_path):
    content = arrays(val=True)
    for fraction in (0, 0.1, 0.5):
        splits = load_dataset(saved(tmp_path, **content), val_fraction=fraction, label_noise=1.0, imbalance_ratio=0.5)
        assert torch.equal(splits.val.images, torch.from_numpy(content["val_images"]).permute(0, 3, 1, 2))
        assert torch.equal(splits.val.labels, torch.from_numpy(content["val_labels"]))
        assert splits.class_counts == torch.bincount(splits.train.labels, minlength=4).tolist()
        assert torch.bincount(splits.train.clean_labels).tolist() == [10, 7, 6, 5]


def test_gray_images_and_column_labels_are_taken(tmp_path):
    content = arrays(channels=1)
    gray = {key: value[..., 0] for key, value in content.items() if key.endswith("images")}
    columns = {key: value[:, None].astype(np.uint8) for key, value in content.items() if key.endswith("labels")}
    splits = load_dataset(saved(tmp_path, **gray, **columns), val_fraction=0)
    assert splits.image_shape == (1, 4, 4)
    assert splits.train.images[:, 0, 0, 0].tolist() == list(range(40))
    assert splits.train.labels.tolist() == [i % 4 for i in range(40)]


NO_FLOATS = r"train_images must be uint8 NHWC in 0 to 255, got float64; .*\(images \* 255\)"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_labels": None}, ValueError, r"lacks \['train_labels'\].*found"),
        ({"val_images": arrays()["test_images"]}, ValueError, r"lacks \['val_labels'\]"),
        ({"train_images": arrays()["train_images"] / 255}, TypeError, NO_FLOATS),
        ({"test_images": arrays()["test_images"].astype(np.int32)}, TypeError, "test_images must be uint8"),
        ({"train_images": arrays()["train_images"].transpose(0, 3, 1, 2)}, ValueError, r"look like NCHW.*transpose"),
        ({"train_images": np.zeros((40, 8), np.uint8)}, ValueError, r"\(N, H, W, C\)"),
        ({"test_images": np.zeros((0, 4, 4, 3), np.uint8)}, ValueError, "non-empty"),
        ({"test_images": arrays(side=5)["test_images"]}, ValueError, r"test_images are \(5, 5, 3\), train_images"),
        ({"train_labels": np.arange(39) % 4}, ValueError, "39 train_labels for 40 train_images"),
        ({"train_labels": np.zeros(0, np.int64)}, ValueError, "0 train_labels for 40"),
        ({"train_labels": np.arange(40) % 4 + 0.0}, TypeError, "whole class numbers, got float64"),
        ({"train_labels": np.eye(4, dtype=np.int64)[np.arange(40) % 4]}, ValueError, r"shape \(N,\) or \(N, 1\)"),
        ({"train_labels": np.arange(40) % 4 - 1}, ValueError, "train_labels must lie in 0 to 2"),
        ({"test_labels": np.arange(20) % 5}, ValueError, "test_labels must lie in 0 to 3, .*got 0 to 4"),
        ({"train_labels": np.arange(40) * 10**9}, ValueError, "only 40 classes occur, so these are no class numbers"),
        ({"train_labels": np.zeros(40, np.int64), "test_labels": np.zeros(20, np.int64)}, ValueError, "at least 2"),
        ({"train_labels": np.array([{"a": 1}] * 40)}, ValueError, "other than plain arrays"),
    ],
)
def test_each_broken_array_has_its_own_error(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        load_dataset(saved(tmp_path, **changes))


def test_a_missing_file_says_what_it_should_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.npz; an npz data set holds train_images"):
        load_dataset(f"npz:{tmp_path / 'nowhere.npz'}")


def test_files_that_are_no_npz_are_refused(tmp_path):
    saved(tmp_path)
    whole = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("train_images")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("short.npz", "empty.npz", "text.npz", "one.npy"):
        with pytest.raises(ValueError, match=f"{name} is no npz file, or was cut short"):
            load_dataset(f"npz:{tmp_path / name}")


def test_damage_inside_the_file_is_found(tmp_path):
    saved(tmp_path)
    content = bytearray((tmp_path / "set.npz").read_bytes())
    at = content.index(arrays()["train_images"].tobytes()[:16])
    content[at] ^= 0xFF
    (tmp_path / "set.npz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"set\.npz is damaged"):
        load_dataset(tmp_path / "set.npz")
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:
        for key in arrays():
            archive.writestr(key, b"not an array")
    with pytest.raises(TypeError, match="must be uint8"):
        load_dataset(tmp_path / "raw.npz")


def test_pickles_are_never_loaded(tmp_path):
    loaded = tmp_path / "loaded"

    class Trap:
        def __reduce__(self):
            return open, (str(loaded), "w")

    saved(tmp_path, train_labels=np.array([Trap()] * 40))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("set.npz", "bare.npz"):
        with pytest.raises(ValueError, match=name):
            load_dataset(tmp_path / name)
    assert not loaded.exists()


def test_a_test_split_alone_is_enough_for_an_evaluation(tmp_path):
    name = saved(tmp_path, train_images=None, train_labels=None)
    test = load_test(name)
    assert torch.equal(test.images, torch.from_numpy(arrays()["test_images"]).permute(0, 3, 1, 2))
    assert (test.num_classes, test.labels.tolist()) == (4, [i % 4 for i in range(20)])
    with pytest.raises(ValueError, match=r"has a test split alone; it can be evaluated on \(load_test\)"):
        load_dataset(name)
    whole = saved(tmp_path)
    assert torch.equal(load_test(whole).images, load_dataset(whole).test.images)


def test_missing_classes_are_named_in_a_warning(tmp_path):
    labels = np.array([0, 1, 2, 4] * 10)
    with pytest.warns(UserWarning, match=r"set: 1 of 5 classes have no training sample \(3\)"):
        splits = load_dataset(saved(tmp_path, train_labels=labels), val_fraction=0.1)
    assert splits.class_counts == [9, 9, 9, 0, 9]
    assert splits.val.class_counts == [1, 1, 1, 0, 1]
    with pytest.warns(UserWarning, match="no training"), pytest.raises(ValueError, match="no long tail can be cut"):
        load_dataset(saved(tmp_path, train_labels=labels), imbalance_ratio=0.5)


def test_labels_that_start_at_one_are_suspected(tmp_path):
    alone = {"train_images": None, "train_labels": None}
    with pytest.warns(UserWarning, match="1 of 5 classes have no test sample .*start at 1"):
        assert load_test(saved(tmp_path, **alone, test_labels=np.arange(20) % 4 + 1)).num_classes == 5


@pytest.mark.filterwarnings("ignore:.*have no test sample")
def test_a_subset_may_be_told_how_many_classes_there_are(tmp_path):
    name = saved(tmp_path, train_images=None, train_labels=None, test_labels=np.arange(20) % 3)
    assert (load_test(name).num_classes, load_test(name, num_classes=10).num_classes) == (3, 10)
    with pytest.raises(ValueError, match="must lie in 0 to 1, by num_classes, got 0 to 2"):
        load_test(name, num_classes=2)
    with pytest.raises(ValueError, match="digits has 10 classes, not 12"):
        load_test("digits", num_classes=12)
