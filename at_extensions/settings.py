"""The settings of every command: the command line, YAML files, presets and Python build the same dataclasses."""

# ruff: noqa: RUF009  (a call of option makes a field)

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml


def option(default: Any = MISSING, help: str = "", **bounds: Any) -> Any:
    """Return a field with its help text.

    Args:
        default: Its default; without one the field is required.
        help: One sentence for ``--help`` and the docstring.
        **bounds: ``choices``, or the bounds of ``checks.check_number`` and ``checks.check_count``.
    """
    return field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass(frozen=True)
class Settings:
    """What the settings of all commands share: values are converted and checked when they are made."""

    def __init_subclass__(cls) -> None:
        found = [f for base in cls.__mro__[1:] for f in getattr(base, "__dataclass_fields__", {}).items()]
        found += [(name, f) for name, f in vars(cls).items() if isinstance(f, Field)]
        lines = [f"    {name}: {f.metadata['help']}" for name, f in dict(found).items()]
        cls.__doc__ = "\n".join([cls.__doc__, "", "Attributes:", *lines])

    def __post_init__(self) -> None:
        for f in fields(self):
            value = convert(f.name, kinds_of(type(self))[f.name], getattr(self, f.name))
            object.__setattr__(self, f.name, _bounded(f.name, value, **f.metadata["bounds"]))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Settings:
        """Return settings from plain data, such as a YAML file's; ``paper.title`` is a setting within another.

        Raises:
            ValueError: A name that is no setting (the nearest ones are named), a required one that is missing, or a
                value out of range.
            TypeError: A value of another kind.
        """
        from at_extensions.checks import check_name

        known = {f.name: f for f in fields(cls)}
        given = {check_name("setting", name, known): value for name, value in _unfolded(given).items()}
        missing = [name for name, f in known.items() if f.default is MISSING and name not in given]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; there is no default")
        return cls(**given)

    @classmethod
    def of(cls, settings: Settings | None, changes: Mapping[str, Any]) -> Settings:
        """Return ``settings`` with changes, or settings of the changes alone.

        Raises:
            TypeError, ValueError: As ``from_dict``; or ``settings`` is no object of this class.
        """
        if settings is None:
            return cls.from_dict(changes)
        if not isinstance(settings, cls):
            raise TypeError(f"settings must be {cls.__name__}, got {type(settings).__name__}")
        return replace(settings, **changes) if set(changes) <= kinds_of(cls).keys() else cls.from_dict(changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as plain data."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.to_dict() if isinstance(value, Settings) else value for name, value in values.items()}

    def arguments(self) -> list[str]:
        """Return the words of the command line that say what differs from the defaults."""
        words = []
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Settings):
                words += [w.replace("--", f"--{f.name}.", 1) if w.startswith("--") else w for w in value.arguments()]
            elif value != f.default:
                words += [flag(f.name), as_text(value)]
        return words


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
class EvaluateSettings(Settings):
    """Evaluation."""

    eps: float | None = option(None, "Radius, such as 8/255; the one that the run trained for by default.")
    norm: str = option("Linf", "Linf, L2 or L1.", choices=("Linf", "L2", "L1"))
    version: str = option("standard", "standard, plus, rand, or custom with a list of attacks.")
    attacks: list[str] | None = option(None, "For version custom: apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square.")
    n_examples: int | None = option(
        None, "Attack only that many test images, a random subset drawn by the seed; the report says so.", at_least=1
    )
    checkpoint: str | None = option(None, "best or last; the best there is by default.", choices=("best", "last"))
    data: str | None = option(None, "Another data set than the run's own.")
    root: str | None = option(None, "Folder that holds the data set, in torchvision's layout.")
    batch_size: int | None = option(None, "Images attacked at a time.", at_least=1)
    precision: str = option("fp32", "Of the search, fp32 or bf16; each adversarial example is verified in fp32.")
    compile: bool = option(False, "Search with a model compiled by torch.compile.")
    keep_examples: int = option(8, "Misclassified adversarial examples to keep for the report.", at_least=0)
    seed: int = option(0, "Seed of the attacks and of the subset.", at_least=0)
    device: str | None = option(None, "cpu, cuda, ...; a GPU where there is one by default (one a process).")
    progress: bool = option(True, "Show progress: a bar an attack on a terminal, else lines.")


@dataclass(frozen=True, kw_only=True)
class CriticalitySettings(Settings):
    """Layer criticality."""

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
    out: str = option("runs/criticality", "Folder to write into.")
    trials: int = option(3, "Resets of each layer.", at_least=1)
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
    seed: int = option(0, "Trial t draws its network with seed + t.")
    threat_model: str = option("Linf", "RobustBench's, for ids: Linf, L2 or corruptions.")
    model_folder: str = option("models", "Where RobustBench keeps what it downloads.")
    device: str | None = option(None, "cpu, cuda, ...; a GPU where there is one by default.")
    progress: bool = option(True, "Show progress: a bar on a terminal, else lines.")


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

    def __post_init__(self) -> None:
        super().__post_init__()
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
    architecture: str | None = option(None, "Name of the network in print; made from the model's name by default.")
    allow_partial: bool = option(False, "Write a result that RobustBench would not rank, marked as such.")
    allow_other_eps: bool = option(False, "Publish an evaluation at another radius than the run trained for.")


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Settings):
    """Verification."""

    n_examples: int = option(100, "Test images that AutoAttack attacks, a random subset drawn by the seed.", at_least=1)
    data: str | None = option(None, "Test data, named as for training; the published data set by default.")
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


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file; a run's ``config.yaml`` gives the settings of that run.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a YAML mapping.
    """
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} does not hold a mapping of settings")
    return TrainSettings.from_config(given).to_dict() if isinstance(given.get("training"), Mapping) else dict(given)


def flag(name: str) -> str:
    """Return a setting's name on the command line: ``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


@cache
def kinds_of(settings: type[Settings]) -> dict[str, Any]:
    """Return the type of each setting of a class."""
    hints = get_type_hints(settings)
    return {f.name: hints[f.name] for f in fields(settings)}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def convert(name: str, kind: Any, value: Any) -> Any:
    """Return ``value`` as ``kind``: texts are read as the command line's, such as ``8/255``, ``true`` or ``1,2``.

    Raises:
        TypeError: A value of another kind.
        ValueError: A text that cannot be read.
    """
    kinds = alternatives(kind)
    if type(None) in kinds and (value is None or (isinstance(value, str) and value == "null")):
        return None
    kind = next(k for k in kinds if k is not type(None))
    if isinstance(kind, type) and issubclass(kind, Settings):
        return _nested(kind, value)
    if get_origin(kind) is list:
        items = _read(name, value, "[") if isinstance(value, str) else value
        items = items.split(",") if isinstance(items, str) else items
        items = list(items) if isinstance(items, (list, tuple)) else [items]
        return [convert(f"each of {name}", get_args(kind)[0], i.strip() if isinstance(i, str) else i) for i in items]
    if kind is dict:
        value = _read(name, value, "{") if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            raise TypeError(f'{name} must be a mapping such as {{"width": 16}}, got {value!r}')
        return dict(value)
    return _scalar(name, kinds, kind, value)


def _scalar(name: str, kinds: tuple, kind: type, value: Any) -> Any:
    from at_extensions.checks import parse_fraction

    if kind is bool:
        word = value.lower() if isinstance(value, str) else value
        if word in ("true", "false") or isinstance(value, bool):
            return word in ("true", True)
        if str in kinds and isinstance(value, str):
            return value
        raise TypeError(f"{name} must be true or false, got {value!r}")
    if kind is float:
        if isinstance(value, bool) or value is None:
            raise TypeError(f"{name} must be a number such as 0.1 or 8/255, got {value!r}")
        try:
            return parse_fraction(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if kind is int:
        if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return int(value)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        return int(value)
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name} must be a text, got {value!r}")
    return str(value)


def _unfolded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name; those such as ``paper.title`` are put into the mapping or YAML file ``paper``."""
    found: dict[str, Any] = {}
    for name, value in sorted(given.items(), key=lambda item: "." in item[0]):
        outer, _, inner = str(name).replace("-", "_").partition(".")
        found[outer] = _as_mapping(found.get(outer)) | {inner: value} if inner else value
    return found


def _as_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Settings):
        return value.to_dict()
    return read_settings(value) if isinstance(value, (str, Path)) else dict(value or {})


def _nested(kind: type[Settings], value: Any) -> Settings:
    if isinstance(value, kind):
        return value
    return kind.from_dict(_as_mapping(value))


def _read(name: str, text: str, opening: str) -> Any:
    """Return the list or mapping in a text of JSON or YAML; any other text as it is."""
    if not text.strip().startswith(opening):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} cannot be read as JSON: {text!r}") from error


def _bounded(name: str, value: Any, *, choices: tuple = (), norm: str | None = None, **bounds: float) -> Any:
    from at_extensions.checks import check_count, check_eps, check_name, check_number

    if value is None:
        return None
    if choices:
        return check_name(name, value, choices)
    if norm is not None:
        return check_eps(value, norm, name=name)
    if bounds:
        return (check_count if isinstance(value, int) else check_number)(name, value, **bounds)
    return value


def as_text(value: Any) -> str:
    """Return a value as a word of the command line; a radius such as 8/255 as that fraction."""
    if isinstance(value, float):
        steps = f"{round(255 * value)}/255"
        return steps if round(255 * value) / 255 == value and len(steps) < len(repr(value)) else repr(value)
    if isinstance(value, list) and all(isinstance(item, str) and "," not in item for item in value):
        return ",".join(value)
    return value if isinstance(value, str) else json.dumps(value)


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
