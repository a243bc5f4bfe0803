"""The settings of every command: the command line, YAML files, presets and Python build the same dataclasses."""

# ruff: noqa: RUF009  (a call of option makes a field)

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from at_extensions.configuration import Settings, as_text, option, read_yaml


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Data set."""

    data: str = option(
        "digits",
        "digits, cifar10, cifar100, svhn, npz:PATH (arrays train_images, train_labels, test_images and test_labels) or "
        "folder:PATH (a folder a class, in train and val or test).",
    )
    root: str | None = option(None, "Folder that holds the data set, in torchvision's layout.")
    val_fraction: float = option(
        0.1, "Share of the training data that chooses the best epoch; 0 trains without validation.", at_least=0, below=1
    )
    imbalance_ratio: float | None = option(
        None, "Smallest over largest class, for a long-tailed training set.", above=0, at_most=1
    )
    imbalance_kind: str = option(
        "exp", "exp (each class a fixed share of the one before) or step (half of the classes are small)."
    )
    label_noise: float | None = option(None, "Share of training labels drawn anew at random.")
    label_noise_kind: str = option("uniform", "uniform (over all classes) or other (never the true one).")
    image_size: int | None = option(None, "Side in pixels to which the images of a folder are brought.", at_least=1)
    train_size: int | None = option(
        None, "Train on that many images, as evenly over the classes as they allow.", at_least=1
    )
    data_seed: int = option(0, "Seed of the validation split, long tail and label noise.")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Model."""

    model: str = option(
        "small_cnn",
        "A name of at_extensions.list_models(): small_cnn, preact_resnet18, wide_resnet_28_10, timm's, ...",
    )
    model_options: dict | None = option(None, 'More options of the architecture, such as {"width": 16}.')
    mean: list[float] | None = option(None, "Subtracted inside the model, one number a channel.")
    std: list[float] | None = option(None, "Divided by inside the model, one number a channel.")


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Settings):
    """Method and its attack."""

    method: str = option("pgd", "A name of at_extensions.list_methods(): pgd, n_fgsm, rs_fgsm, fgsm, standard, ...")
    eps: float = option("8/255", "Linf radius of training and validation attack, such as 8/255.", norm="Linf")
    alpha: float | None = option(None, "Step size of the training attack; the method's own by default.")
    steps: int | None = option(None, "Steps of the training attack; the method's own by default.")
    method_options: dict | None = option(None, 'More options of the method, such as {"k": 1.0}.')


@dataclass(frozen=True, kw_only=True)
class OptimSettings(Settings):
    """Optimisation."""

    epochs: int = option(30, "Passes over the training data.", at_least=1)
    batch_size: int = option(128, "Images a step, over all processes together.", at_least=1)
    optimizer: str = option("sgd", "sgd, adamw or deat.")
    lr: float = option(0.1, "Peak learning rate.", at_least=0)
    momentum: float = option(0.9, "Momentum of SGD.")
    weight_decay: float = option(5e-4, "Weight decay.")
    optimizer_options: dict | None = option(
        None, 'More options of the optimiser, such as {"k1": 1.0, "k2": 0.8, "decoupled": true} for deat.'
    )
    schedule: str = option("onecycle", "onecycle, step, cosine or constant.")
    warmup: float = option(0.5, "Share of a one-cycle run in which the rate rises.")
    milestones: list[int] | None = option(
        None, "Epochs after which a step schedule divides the rate by ten; 1/2 and 3/4 of the run by default."
    )
    augment: str = option("crop_flip", "crop_flip, crop or none.")
    val_steps: int = option(10, "PGD steps of the validation attack (step size 2.5 eps / steps).", at_least=1)
    precision: str = option("fp32", "fp32 or bf16.")
    channels_last: bool = option(True, "Memory format of convolutions and images.")
    compile: bool | str = option(
        False, "Compile the model with torch.compile; a text is its mode, such as reduce-overhead for CUDA graphs."
    )
    ema: float | None = option(
        None, "Decay of the weights' exponential moving average, such as 0.995; the average is then evaluated."
    )
    clip_grad: float | None = option(None, "Largest L2 norm of the gradient.")


_GROUPS = {"data": DataSettings, "method": MethodSettings, "training": OptimSettings}
_DERIVED = ("class_counts", "num_classes", "in_chans")  # follow from the data


@dataclass(frozen=True, kw_only=True)
class TrainSettings(OptimSettings, MethodSettings, ModelSettings, DataSettings):
    """Run."""

    seed: int = option(0, "Seed of initial weights, order, augmentation and attacks.")
    resume: bool = option(True, "Go on with the run in OUT; false refuses a directory that holds one.")
    progress: bool = option(True, "Show progress: bars on a terminal, else a line an epoch.")

    def to_config(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Return the contents of ``config.yaml``, grouped by subject.

        Args:
            recipe: Of the model (``create_model``).
        """
        config = {name: {f.name: getattr(self, f.name) for f in fields(group)} for name, group in _GROUPS.items()}
        for name in ("data", "method"):
            config[name] = {"name": config[name].pop(name)} | config[name]
        return {"model": dict(recipe)} | config | {"seed": self.seed}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrainSettings:
        """Return the settings of a run from its ``config.yaml``; what it lacks keeps its default.

        Raises:
            ValueError: ``train`` did not write it, or it holds settings that this version does not know.
        """
        groups = {name: dict(part) for name, part in config.items() if isinstance(part, Mapping)}
        if not {"model", *_GROUPS} <= groups.keys() or not all(
            groups[n].get("name") for n in ("data", "model", "method")
        ):
            raise ValueError("not the config.yaml of a run that train wrote: it lacks data, model, method or training")
        data, model, method, training = (groups[name] for name in ("data", "model", "method", "training"))
        given = {"data": data.pop("name"), **data, "model": model.pop("name")}
        given |= {key: model.pop(key) for key in ("mean", "std") if key in model}
        given |= {"method": method.pop("name"), **method, **training, "seed": config.get("seed") or 0}
        given["model_options"] = {key: value for key, value in model.items() if key not in _DERIVED} or None
        return cls.from_dict({key: value for key, value in given.items() if key not in _DERIVED})


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
    version: str = option("standard", "standard, plus, rand, or custom with a list of attacks.")
    attacks: list[str] | None = option(None, "For version custom: apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square.")
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


@dataclass(frozen=True, kw_only=True)
class MeasureSettings(Settings):
    """Measurement of trained models on test images."""

    model: list[str] = option(help="Run directories, weights files, RobustBench ids or architectures, in any mix.")
    checkpoint: list[str | None] | None = option(
        None, "Weights for architectures, one for each model; timm's pretrained ones by default."
    )
    data: str = option("cifar10", "Data set, as for training.")
    root: str | None = option(None, "Folder that holds the data set, in torchvision's layout.")
    image_size: int | None = option(None, "Side in pixels of the images of a folder.", at_least=1)
    n_examples: int = option(
        1000, "Test images to measure on at most, as evenly over the classes as they allow.", at_least=1
    )
    seed: int = option(0, "Seed of all random draws.")
    threat_model: str = option("Linf", "RobustBench's, for ids: Linf, L2 or corruptions.")
    model_folder: str = option("models", "Where RobustBench keeps what it downloads.")
    device: str | None = option(None, "cpu, cuda, ...; a GPU where there is one by default.")
    progress: bool = option(True, "Show progress: a bar on a terminal, else lines.")


@dataclass(frozen=True, kw_only=True)
class CriticalitySettings(MeasureSettings):
    """Layer criticality."""

    out: str = option("runs/criticality", "Folder to write into.")
    trials: int = option(3, "Resets of each layer; trial t draws its network with seed + t.", at_least=1)
    reset: str = option("random", "random, norm_matched, permute or zero.")
    divergence: str = option("cosine", "cosine, js or kl.")
    attack_eps: float | None = option(
        None, "Measure on PGD examples of this Linf radius, such as 8/255, instead of clean images.", norm="Linf"
    )
    attack_steps: int = option(10, "Steps of that attack, each of a quarter of the radius.", at_least=1)
    ci_width: float | None = option(None, "Add trials until each layer's 95 % interval is this narrow.")
    max_trials: int = option(20, "Largest number of trials.", at_least=1)
    batch_size: int = option(64, "Images at a time, at most.", at_least=1)
    memory_limit: int = option(2 * 2**30, "Bytes that may be kept to save work.")


@dataclass(frozen=True, kw_only=True)
class DispersionSettings(MeasureSettings):
    """Local dispersion."""

    out: str = option("runs/dispersion", "Folder to write into.")
    eps: float = option("8/255", "Linf radius of PGD, such as 8/255.", norm="Linf")
    alpha: float | None = option(None, "Step size of PGD; a quarter of the radius by default.", above=0)
    steps: int = option(10, "Steps of PGD.", at_least=1)
    starts: int = option(10, "Random starts an image.", at_least=2)
    norm: str = option("2", "Norm of the distances between end points: 1, 2 or inf.", choices=("1", "2", "inf"))
    batch_size: int = option(128, "Images at a time, at most.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class InstabilitySettings(MeasureSettings):
    """Gradient instability."""

    out: str = option("runs/instability", "Folder to write into.")
    method: str = option("pgd", "The training method whose gradient is followed: a name of list_methods().")
    eps: float = option("8/255", "Linf radius of its attack, such as 8/255.", norm="Linf")
    n_examples: int = option(128, "Test images behind the gradient, at most.", at_least=1)
    direction: str = option("update", "update (minus the gradient) or random.", choices=("update", "random"))
    steps: list[float] | None = option(
        None, "Step lengths, in units of the learning rate; 0.1, 0.2, 0.5, 1, 2 and 5 by default."
    )
    lr: float = option(0.1, "The learning rate.", above=0)


@dataclass(frozen=True)
class Paper(Settings):
    """The bibliographic part of a leaderboard's entry."""

    title: str = option(help="Title of the paper.")
    authors: str = option(help="Authors, separated by commas.")
    link: str = option(help="Address of the paper.")
    venue: str = option("", 'Where it appeared, such as "ICML 2023" or "arXiv, Feb 2023"; empty if nowhere yet.')
    reported: float | None = option(None, "Robust accuracy that the paper itself reports, in [0, 1].")
    additional_data: bool = option(
        False,
        "Whether images beyond the training set were used. Images from a generator that was trained on the training "
        "set alone do not count; say so in the footnote.",
    )
    footnote: str = option("", "A remark shown under the table.")
    code: str = option("", "Address of checkpoint and code; a submission asks for it.")
    license: str = option("MIT", "Licence of the weights: an identifier, or the address of its text.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9.+-]+|https?://[^\s\"'<>]+", self.license):
            raise ValueError(
                f"license must be an identifier such as MIT or the address of its text, got {self.license!r}"
            )
        for name in ("title", "authors", "link"):
            if not getattr(self, name).strip():
                raise ValueError(f"the paper's {name} must be a non-empty string, got {getattr(self, name)!r}")
        if self.reported is not None and not 0 <= self.reported <= 1:
            hint = f"; did you mean {self.reported / 100:g}?" if 1 < self.reported <= 100 else ""
            raise ValueError(f"reported must be a fraction in [0, 1], got {self.reported:g}{hint}")


@dataclass(frozen=True, kw_only=True)
class PublishSettings(Settings):
    """Submission."""

    id: str = option(
        help="First author, year, first word of the title, optional variant, such as Wang2023Better_WRN-28-10."
    )
    paper: Paper = option(help="A YAML file with title, authors, link, ..., or --paper.title, --paper.authors, ...")
    out: str | None = option(None, "The folder to write, new or empty; named after the id by default.")
    dataset: str | None = option(
        None, "RobustBench's name of the data set, or a free name for one of your own; the run's name by default."
    )
    architecture: str | None = option(None, "Printed name of the network; made from its name and options by default.")
    allow_partial: bool = option(False, "Write a result that RobustBench would not rank, marked as such.")
    allow_other_eps: bool = option(False, "Publish an evaluation at another radius than the run trained for.")


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Settings):
    """Verification."""

    n_examples: int = option(100, "Test images that AutoAttack attacks, a random subset drawn by the seed.", at_least=1)
    data: str | None = option(None, "Test data, named as for training; the published data set by default.")
    trust_code: bool = option(False, "Run the code in the folder where that makes its network; read it first.")
    root: str | None = option(None, "Folder that holds the data set, in torchvision's layout.")
    seed: int = option(0, "Seed of the subset and the attacks.", at_least=0)
    device: str | None = option(None, "cpu, cuda, ...; a GPU where there is one by default.")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """Page of several runs."""

    out: str | None = option(None, "The file to write; report.html in the folder by default.")
    title: str = option("Robustness report", "Heading of the page.")


@dataclass(frozen=True, kw_only=True)
class LeaderboardSettings(Settings):
    """Leaderboard."""

    out: str | None = option(None, "The file to write; leaderboard.html in the folder by default.")
    title: str = option("Robustness leaderboard", "Heading of the page.")


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Demonstration."""

    out: str = option("runs/demo", "Folder for the two runs and the report.")
    epochs: int = option(60, "Passes over the training data of each run.", at_least=1)
    seed: int = option(0, "Seed of initial weights, order, augmentation and attacks.", at_least=0)
    progress: bool = option(True, "Show progress: bars on a terminal, else lines.")


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file; a run's ``config.yaml`` gives the settings of that run.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a YAML mapping.
    """
    given = read_yaml(path)
    return TrainSettings.from_config(given).to_dict() if isinstance(given.get("training"), Mapping) else given


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the settings in which two configurations differ, with both values: ``method.eps: 0.1, now 0.2``.

    A fraction equals its number, and a setting that one of them lacks equals None.
    """
    old, new = _flat(before), _flat(after)
    names = [name for name in {**old, **new} if not name.startswith("versions")]
    return [
        f"{name}: {_shown(old.get(name))}, now {_shown(new.get(name))}"
        for name in names
        if not _equal(old.get(name), new.get(name))
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else as_text(value)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, str) != isinstance(new, str):
        from at_extensions.checks import parse_fraction

        try:
            return parse_fraction(old) == parse_fraction(new)
        except (TypeError, ValueError):
            return False
    return old == new
