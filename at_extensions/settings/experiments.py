"""The settings of experiments that train models by themselves."""

# ruff: noqa: RUF009  (a call of option makes a field)

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from at_extensions.configuration import Settings, option
from at_extensions.settings.training import TrainSettings

_TRAINING = {f.name: f for f in fields(TrainSettings)}


def as_in_training(name: str, default: Any = MISSING) -> Any:
    """Return an option of ``train``, with another default if one is given."""
    return field(default=_TRAINING[name].default if default is MISSING else default, metadata=_TRAINING[name].metadata)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Demonstration."""

    out: str = option("runs/demo", "Folder for the two runs and the report.")
    epochs: int = option(60, "Passes over the training data of each run.", at_least=1)
    seed: int = option(0, "Seed of initial weights, order, augmentation and attacks.", at_least=0)
    progress: bool = option(True, "Show progress: bars on a terminal, else lines.")


@dataclass(frozen=True, kw_only=True)
class InjectionSettings(Settings):
    """Experiment of injected features."""

    data: str = option("digits", "Data set, as for training; images of even sides, in memory.")
    root: str | None = option(None, "Folder that holds the data set, in torchvision's layout.")
    val_fraction: float = option(0.1, "Share of the training data that is watched each epoch.", above=0, below=1)
    train_size: int | None = option(None, "Train on that many images.", at_least=1)
    test_size: int | None = option(None, "Measure on that many test images; all by default.", at_least=1)
    betas: list[float] = option("0,2/255,4/255,8/255,16/255", "Amplitudes of the features; 0 trains without any.")
    eps: list[float] = option("4/255", "Linf radii.")
    methods: list[str] = option("fgsm", "Training methods: fgsm, rs_fgsm, n_fgsm, pgd, ...")
    mode: str = option("add", "add, or orthogonal: what images hold of the patterns is removed first.",
                       choices=("add", "orthogonal"))  # fmt: skip
    control: bool = option(True, "Also train with patterns drawn at random for each image, whatever its class.")
    seeds: list[int] = option("0,1,2", "One run of each arm a seed.")
    model: str = option("small_cnn", "A name of at_extensions.list_models().")
    model_options: dict | None = option(None, 'More options of the architecture, such as {"width": 16}.')
    epochs: int = option(30, "Passes over the training data.", at_least=1)
    batch_size: int = option(128, "Images a step.", at_least=1)
    lr: float = option(0.2, "Peak learning rate of a one-cycle schedule.", at_least=0)
    precision: str = option("fp32", "fp32 or bf16.", choices=("fp32", "bf16"))
    pgd_steps: int = option(10, "Steps of the method pgd, of 2.5 eps / steps each.", at_least=1)
    val_steps: int = option(10, "PGD steps of the validation attack.", at_least=1)
    attack_steps: int = option(20, "PGD steps of the final measurement, of eps / 4 each.", at_least=1)
    curvature_images: int = option(
        32, "Test images behind the curvature of the loss in the image; 0 leaves it out.", at_least=0
    )
    train_options: dict | None = option(None, 'More options of train, such as {"weight_decay": 0}.')
    threads: int | None = option(None, "CPU threads; all by default.", at_least=1)
    progress: bool = option(True, "Show progress: bars on a terminal, else lines.")

    def __post_init__(self) -> None:
        super().__post_init__()
        from at_extensions.checks import check_count, check_eps

        for name in ("betas", "eps", "methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold at least one value, each once, got {values}")
        for beta in self.betas:
            if beta != 0:
                check_eps(beta, name="each of betas")
        for eps in self.eps:
            check_eps(eps, name="each of eps")
        for seed in self.seeds:
            check_count("each of seeds", seed, at_least=0)


@dataclass(frozen=True, kw_only=True)
class RandomLabelsSettings(Settings):
    """Random labels."""

    out: str = option("runs/random-labels", "Folder for results, figures and runs.")
    methods: list[str] = option(("pgd", "trades", "standard"), "Training methods, names of list_methods().")
    rates: list[float] = option((0.0, 0.5, 1.0), "Shares of training labels drawn anew at random.")
    label_noise_kind: str = as_in_training("label_noise_kind")
    seeds: list[int] = option((0, 1, 2), "Seeds: one run for each method, rate and seed.")
    data: str = as_in_training("data")
    root: str | None = as_in_training("root")
    image_size: int | None = as_in_training("image_size")
    train_size: int | None = as_in_training("train_size", 1000)
    val_fraction: float = as_in_training("val_fraction", 0.0)
    data_seed: int = as_in_training("data_seed")
    model: str = as_in_training("model")
    model_options: dict | None = as_in_training("model_options")
    eps: float = as_in_training("eps")
    alpha: float | None = option(
        None, "Step size of the training attacks; 1.5 eps / steps and at least eps / 4 by default.", above=0
    )
    steps: int = option(3, "Steps of the training attacks.", at_least=1)
    epochs: int = as_in_training("epochs")
    batch_size: int = as_in_training("batch_size", 64)
    optimizer: str = as_in_training("optimizer")
    lr: float = as_in_training("lr")
    momentum: float = as_in_training("momentum")
    weight_decay: float = as_in_training("weight_decay", 0.0)
    schedule: str = as_in_training("schedule", "step")
    milestones: list[int] | None = as_in_training("milestones")
    augment: str = as_in_training("augment", "none")
    precision: str = as_in_training("precision")
    pgd_steps: int = option(10, "Steps of the PGD that the runs are measured with, each of eps / 4.", at_least=1)
    n_test: int = option(
        1000, "Test images to measure on at most, as evenly over the classes as they allow.", at_least=1
    )
    n_instability: int = option(
        128, "Training images behind the gradient instability, at most; 0 leaves it out.", at_least=0
    )
    threads: int | None = option(None, "CPU threads of this process; unchanged by default.", at_least=1)
    progress: bool = as_in_training("progress")


@dataclass(frozen=True, kw_only=True)
class InducedDistributionSettings(Settings):
    """Induced distribution experiment."""

    out: str | None = option(
        None,
        "Folder for the results, one JSON file for each epoch and seed; induced_distribution in RUN by default, from "
        "where the run's report shows them.",
    )
    epochs: list[int] | None = option(None, "Kept epochs to use; all of them by default.")
    every: int | None = option(None, "Use the kept epochs that this number divides.", at_least=1)
    holdout: float = option(
        0.5, "Share of the training data that the run must have left out, to draw set B from.", above=0, below=1
    )
    images: int | None = option(None, "Images of A and of B at most; as many as there are by default.", at_least=1)
    test_images: int | None = option(None, "Test images at most; all by default.", at_least=1)
    eps: float | None = option(None, "Linf radius of the perturbations; the run's own by default.", norm="Linf")
    alpha: float | None = option(None, "Step size of PGD; a quarter of the radius by default.", above=0)
    steps: int = option(10, "Steps of PGD.", at_least=1)
    zero_start: bool = option(False, "Also perturb A without a random start, as a control of dispersion 0.")
    exact: bool = option(False, "Keep perturbed images in float32 instead of 8 bits a value.")
    net_epochs: int = option(15, "Epochs of each new network.", at_least=1)
    lr: float = option(0.1, "Its peak learning rate, of SGD with momentum 0.9.", above=0)
    weight_decay: float = option(5e-4, "Its weight decay.", at_least=0)
    batch_size: int = option(128, "Images a step.", at_least=1)
    schedule: str = option("cosine", "cosine, step, onecycle or constant.")
    milestones: list[int] | None = option(None, "Epochs after which a step schedule divides the rate by ten.")
    precision: str = option("fp32", "Precision of the new networks' training: fp32 or bf16.", choices=("fp32", "bf16"))
    starts: int = option(10, "Random starts an image behind the local dispersion.", at_least=2)
    probe: int = option(512, "Images of each set to measure the local dispersion on.", at_least=2)
    seeds: list[int] | None = option(None, "Seeds of new networks and random starts; 0 by default.")
    data: str | None = option(None, "The run's data set, where it lies elsewhere on this machine.")
    root: str | None = option(None, "Folder that holds the data set, where it is another one on this machine.")
    device: str | None = option(None, "cpu, cuda, ...; a GPU where there is one by default.")
    progress: bool = option(True, "Show progress: a bar on a terminal, else lines.")
