"""The settings of a training run, as its ``config.yaml`` groups them."""

# ruff: noqa: RUF009  (a call of option makes a field)

from __future__ import annotations

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
    inject_beta: float | None = option(
        None, "Amplitude, such as 8/255, of a pattern of the class in all images; see data.carriers."
    )
    inject_mode: str = option(
        "add",
        "add (x + beta V), orthogonal (all patterns are removed from x first), reverse or reverse_orthogonal (minus), "
        "or carrier_only (on black).",
        choices=("add", "orthogonal", "reverse", "reverse_orthogonal", "carrier_only"),
    )
    inject_permuted: bool = option(False, "Draw each image's pattern at random, whatever its class: a control.")
    inject_seed: int = option(0, "Seed of those draws.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inject_beta is None:
            for name in ("inject_mode", "inject_permuted", "inject_seed"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"{name} changes nothing without an amplitude; set inject_beta, such as 8/255")
        elif self.inject_beta != 0:
            from at_extensions.checks import check_eps

            check_eps(self.inject_beta, name="inject_beta")


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
    guard: str | None = option(
        None,
        "Against catastrophic overfitting: warn, stop, or rollback (go back within the epoch and on with the remedy).",
        choices=("warn", "stop", "rollback"),
    )
    guard_remedy: str | None = option(
        None,
        "After a rollback: n_fgsm (the default), grad_align, more_steps or lower_alpha.",
        choices=("n_fgsm", "grad_align", "more_steps", "lower_alpha"),
    )
    keep_every: int | None = option(
        None, "Keep the weights of every so-many-th epoch, beside the last and the best.", at_least=1
    )


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
        if self.inject_beta is None:
            config["data"] = {key: value for key, value in config["data"].items() if not key.startswith("inject_")}
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
