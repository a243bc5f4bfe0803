"""CIFAR-10-C's arrays: severities are the right blocks, corruptions follow one another, broken files are named."""

import numpy as np
import pytest
import torch

from at_extensions.data import load_dataset, load_test
from at_extensions.data.corruptions import CORRUPTIONS


@pytest.fixture
def folder(tmp_path):
    """Three corruptions of four images in five severities; the first byte is the image's place, the second its file."""
    for number, name in enumerate(("fog", "snow", "saturate")):
        images = np.zeros((20, 4, 4, 3), np.uint8)
        images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(20), number
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 1, 9, 0], np.int32), 5))
    return tmp_path


def places(split):
    return split.images[:, 0, 0, 0].tolist()


pytestmark = pytest.mark.filterwarnings("ignore:.*have no test sample")


@pytest.mark.parametrize("name", ["fog.npy", "fog"])
def test_a_severity_is_its_block(folder, name):
    assert places(load_test(f"cifar10c:{folder / name}")) == list(range(20))
    worst = load_test(f"cifar10c:{folder / name}", severity=5)
    assert places(worst) == [16, 17, 18, 19]
    assert (worst.labels.tolist(), worst.num_classes, worst.name) == ([3, 1, 9, 0], 10, "fog, severity 5")


def test_a_folder_gives_the_benchmarks_corruptions_in_their_order(folder):
    both = load_test(f"cifar100c:{folder}", severity=2)
    assert (places(both), both.num_classes) == ([4, 5, 6, 7] * 2, 100)
    assert both.images[:, 1, 0, 0].tolist() == [1] * 4 + [0] * 4  # snow comes before fog
    assert "saturate" not in CORRUPTIONS
    assert torch.equal(both.labels, torch.tensor([3, 1, 9, 0] * 2))
    assert load_test("cifar10c:snow", root=folder, severity=1).images[:, 1, 0, 0].tolist() == [1] * 4


def test_what_cannot_be_read_is_named(folder):
    cases = [
        ("cifar10c:hail", {}, FileNotFoundError, "corruptions there: fog, saturate, snow"),
        ("cifar10c:fog", {"severity": 6}, ValueError, "severity must lie in 1 to 5"),
        ("cifar10c:nowhere/fog", {}, FileNotFoundError, "must hold labels.npy"),
        ("digits", {"severity": 3}, ValueError, "severity is for cifar10c:PATH"),
    ]
    for name, options, error, message in cases:
        with pytest.raises(error, match=message):
            load_test(name, root=None if name == "digits" else folder, **options)
    np.save(folder / "short.npy", np.zeros((7, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"holds 7 images, labels\.npy 20 labels"):
        load_test("cifar10c:short", root=folder)
    np.save(folder / "objects.npy", np.array([{}] * 20))
    with pytest.raises(ValueError, match=r"objects\.npy is damaged, or no npy file"):
        load_test("cifar10c:objects", root=folder)
    with pytest.raises(ValueError, match="has a test split alone"):
        load_dataset("cifar10c:fog", root=folder)
