"""Image folders: samples that are decoded when they are needed, for data that do not fit in memory."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from at_extensions.data.split import LabelledSplit


@dataclass(eq=False, repr=False)
class FolderSplit(LabelledSplit):
    """One split of image files; ``split[i]`` decodes, resizes and crops the middle, as timm does for evaluation.

    Args:
        files: Paths of N images.
        labels: Class numbers (N,); stored as int64.
        num_classes: How many classes there are, K.
        image_size: Side of the square images that come out, in pixels.
        name: Name of the data in reports.
        class_names: K names, where they are known.
        clean_labels: The labels before any were corrupted (N,); ``labels`` if None.

    Raises:
        TypeError: Labels that are not whole numbers.
        ValueError: Labels out of range, or not as many as files.
    """

    files: list[str]
    labels: Tensor
    num_classes: int
    image_size: int = 224
    name: str = "folder"
    class_names: tuple[str, ...] | None = None
    clean_labels: Tensor | None = None

    def __post_init__(self):
        self._check_labels(len(self.files))
        self._transform = _transform(self.image_size, "none")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(_decode(self.files[index])), int(self.labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (3, H, W) of one image."""
        return (3, self.image_size, self.image_size)

    def select(self, index: Tensor) -> FolderSplit:
        """Return the samples at ``index`` (n,), in that order, as a split of its own, numbered from 0."""
        places = torch.arange(len(self))[index]
        return replace(
            self,
            files=[self.files[i] for i in places.tolist()],
            labels=self.labels[places],
            clean_labels=self.clean_labels[places],
        )


class AugmentedFiles(Dataset):
    """Augmented images of a folder for a loader's worker processes; item i depends on (seed, i) alone.

    Reseeds the random generators of the process that it runs in, so it belongs in a worker.
    """

    def __init__(self, split: FolderSplit, augment: str, seed: int):
        self._files, self._seed = split.files, seed
        self._transform = _transform(split.image_size, augment)

    def __getitem__(self, index: int) -> Tensor:
        random.seed(f"{self._seed} {index}")  # timm draws crops from this one, torchvision flips from torch's
        torch.manual_seed(random.getrandbits(63))
        return self._transform(_decode(self._files[index]))


def read_folder(path: Path, image_size: int) -> dict[str, FolderSplit]:
    """Return the splits of a folder with ``train``, ``val`` and ``test``, each with a folder for every class.

    Where there is no ``test``, ``val`` is the test split, as ImageNet's is; otherwise it is the validation split. A
    folder without ``train`` has a test split alone, with the classes of ``classes.txt`` where that file is there.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: There are no images, or classes that the training split or ``classes.txt`` lacks.
    """
    roles = {role: path / role for role in ("train", "val", "test") if (path / role).is_dir()}
    if not roles or list(roles) == ["train"]:
        raise FileNotFoundError(
            f"{path} must hold the folders train and val (or test), each with one folder of images for every class, or "
            f"val (or test) alone for an evaluation; found {sorted(roles) or 'none of them'}"
        )
    if "test" not in roles:
        roles["test"] = roles.pop("val")
    if "train" not in roles:
        roles.pop("val", None)
    found = {role: _list_images(folder) for role, folder in roles.items()}
    listed = path / "classes.txt"
    if "train" in found:
        names, home = found["train"][2], roles["train"]
    elif listed.is_file():
        names, home = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()], listed
    else:
        names, home = found["test"][2], roles["test"]
    splits = {}
    for role, (files, labels, own_names) in found.items():
        strange = sorted(set(own_names) - set(names))
        if strange:
            raise ValueError(f"{roles[role]} has classes that {home} lacks: {strange[:5]}")
        numbers = torch.tensor([names.index(name) for name in own_names])
        splits[role] = FolderSplit(files, numbers[labels], len(names), image_size, path.name, tuple(names))
    return splits


def _list_images(folder: Path) -> tuple[list[str], Tensor, list[str]]:
    """Files, class numbers and class names as timm finds and numbers them."""
    from timm.data import create_dataset

    try:
        reader = create_dataset("", str(folder), search_split=False).reader
    except RuntimeError as error:
        raise ValueError(f"{folder} holds no images: {error}") from error
    files, labels = zip(*reader.samples)
    return list(files), torch.tensor(labels), sorted(reader.class_to_idx, key=reader.class_to_idx.get)


def _decode(file: str) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _transform(image_size: int, augment: str):
    """Timm's transform to float32 in [0, 1], without the normalisation, which belongs in the model."""
    from timm.data import create_transform

    options = {"input_size": image_size, "interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1)}
    if augment == "none":
        return create_transform(**options)
    return create_transform(
        **options, is_training=True, color_jitter=None, hflip=0.5 if augment == "crop_flip" else 0.0
    )
