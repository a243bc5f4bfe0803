"""The settings of measurements of trained models."""

# ruff: noqa: RUF009  (a call of option makes a field)

from __future__ import annotations

from dataclasses import dataclass

from at_extensions.configuration import Settings, option


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

    out: str = option("runs/instability", "Folder to write into; the report of a run shows the one in RUN/instability.")
    method: str = option("pgd", "The training method whose gradient is followed: a name of list_methods().")
    eps: float = option("8/255", "Linf radius of its attack, such as 8/255.", norm="Linf")
    n_examples: int = option(128, "Test images behind the gradient, at most.", at_least=1)
    direction: str = option("update", "update (minus the gradient) or random.", choices=("update", "random"))
    steps: list[float] | None = option(
        None, "Step lengths, in units of the learning rate; 0.1, 0.2, 0.5, 1, 2 and 5 by default."
    )
    lr: float = option(0.1, "The learning rate.", above=0)


@dataclass(frozen=True, kw_only=True)
class NTKSettings(MeasureSettings):
    """Empirical neural tangent kernel."""

    out: str = option("runs/ntk", "Folder to write into.")
    n_examples: int = option(
        100, "Test images of the kernel, at most, as evenly over the classes as they allow.", at_least=2
    )
    outputs: str = option(
        "class",
        "class (a kernel of each logit, and their sum), trace (their sum alone) or sum (of the sum of logits).",
        choices=("class", "trace", "sum"),
    )
    attack_eps: float | None = option(
        None, "Measure on each checkpoint's PGD examples of this Linf radius instead of clean images.", norm="Linf"
    )
    attack_steps: int = option(10, "Steps of that attack, each of a quarter of the radius.", at_least=1)
    memory_limit: int = option(4 * 2**30, "Bytes that may be used beside model and images.", at_least=1)
    double: bool = option(False, "Compute in float64.")
