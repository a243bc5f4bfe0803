"""The settings of an evaluation, and of a model that a user brings to it."""

# ruff: noqa: RUF009  (a call of option makes a field)

from __future__ import annotations

from dataclasses import dataclass

from at_extensions.configuration import Settings, option


@dataclass(frozen=True, kw_only=True)
class OwnModelSettings(Settings):
    """Own model."""

    model: str | None = option(
        None,
        "A name of at_extensions.list_models(), or package.module:factory (file.py:factory) for a class or function of "
        "yours that returns the network; the run directory is then made of it.",
    )
    weights: str | None = option(
        None, "Your checkpoint: .pt, .pth, .ckpt or .safetensors, in any of the usual containers."
    )
    weights_key: str | None = option(
        None, "Which of several sets of weights in the file to take, such as state_dict_ema."
    )
    model_options: dict | None = option(None, 'Arguments of the architecture or factory, such as {"width": 16}.')
    mean: list[float] | None = option(
        None, "Subtracted from images in [0, 1] before the network, one number a channel."
    )
    std: list[float] | None = option(None, "Divided by, one number a channel.")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(OwnModelSettings):
    """Evaluation."""

    eps: float | None = option(None, "Radius, such as 8/255; the one that the run trained for by default.")
    norm: str = option("Linf", "Linf, L2 or L1.", choices=("Linf", "L2", "L1"))
    version: str = option(
        "standard", "standard, plus, rand, pgd-50-10 (50 steps, ten restarts), or custom with a list of attacks."
    )
    attacks: list[str] | None = option(
        None, "For version custom: apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, pgd-50-10."
    )
    n_examples: int | None = option(
        None, "Attack only that many test images, a random subset drawn by the seed; the report says so.", at_least=1
    )
    checkpoint: str | None = option(None, "best or last; the best there is by default.", choices=("best", "last"))
    data: str | None = option(
        None, "Another data set than the run's own: a name, npz:PATH, folder:PATH, cifar10c:PATH or cifar100c:PATH."
    )
    root: str | None = option(None, "Folder that holds the data set, in torchvision's layout.")
    image_size: int | None = option(None, "Side in pixels of the images of a folder.", at_least=1)
    num_classes: int | None = option(
        None, "Number of classes, where the labels of an npz file do not tell.", at_least=2
    )
    severity: int | None = option(None, "Of CIFAR-10-C and CIFAR-100-C, from 1 to 5; all five by default.", at_least=1)
    batch_size: int | None = option(None, "Images attacked at a time.", at_least=1)
    precision: str = option("fp32", "Of the search, fp32 or bf16; each adversarial example is verified in fp32.")
    compile: bool = option(False, "Search with a model compiled by torch.compile.")
    keep_examples: int = option(8, "Misclassified adversarial examples to keep for the report.", at_least=0)
    seed: int = option(0, "Seed of the attacks and of the subset.", at_least=0)
    device: str | None = option(None, "cpu, cuda, ...; a GPU where there is one by default (one a process).")
    progress: bool = option(True, "Show progress: a bar an attack on a terminal, else lines.")
