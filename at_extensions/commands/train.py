"""A whole training run from plain settings: data, model, method, optimiser, schedule, trainer, run directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from at_extensions import processes
from at_extensions.attacks import PGD
from at_extensions.checks import check_eps, parse_fraction
from at_extensions.data import Splits, is_long_tailed, load_dataset, make_loader
from at_extensions.methods import Method, create_method
from at_extensions.models import create_model
from at_extensions.runs import RunDirectory, versions
from at_extensions.training.schedule import create_optimizer, create_scheduler
from at_extensions.training.trainer import Trainer

VAL_BATCH = 500


def train(
    out: str | Path,
    *,
    data: str = "digits",
    root: str | None = None,
    model: str = "small_cnn",
    model_options: dict | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    method: str = "pgd",
    eps: str | float = "8/255",
    alpha: str | float | None = None,
    steps: int | None = None,
    method_options: dict | None = None,
    epochs: int = 30,
    batch_size: int = 128,
    optimizer: str = "sgd",
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    optimizer_options: dict | None = None,
    schedule: str = "onecycle",
    warmup: float = 0.5,
    milestones: list[int] | None = None,
    augment: str = "crop_flip",
    val_fraction: float = 0.1,
    val_steps: int = 10,
    imbalance_ratio: float | None = None,
    imbalance_kind: str = "exp",
    label_noise: float | None = None,
    label_noise_kind: str = "uniform",
    image_size: int | None = None,
    train_size: int | None = None,
    precision: str = "fp32",
    channels_last: bool = True,
    compile: bool | str = False,
    ema: float | None = None,
    clip_grad: float | None = None,
    seed: int = 0,
    data_seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> RunDirectory:
    """Train a classifier adversarially and keep everything about it in a run directory.

    Started again with the same settings, an interrupted run goes on where it was. Under torchrun the batch is shared
    out over the processes. The recipe of a paper is a preset: --preset deat after the command, or preset("deat") in
    Python; what is given beside it wins.

    Args:
        out: The run directory.
        data: digits, cifar10, cifar100, svhn, npz:PATH (arrays train_images, train_labels, test_images and
            test_labels) or folder:PATH (a folder a class, in train and val or test).
        root: Folder that holds the data set, in torchvision's layout.
        model: A name of at_extensions.list_models(): small_cnn, preact_resnet18, wide_resnet_28_10, timm's, ...
        model_options: More options of the architecture, such as {"width": 16}.
        mean: Subtracted inside the model, one number a channel.
        std: Divided by inside the model, one number a channel.
        method: A name of at_extensions.list_methods(): pgd, n_fgsm, rs_fgsm, fgsm, standard, ...
        eps: Linf radius of training and validation attack, such as 8/255.
        alpha: Step size of the training attack; the method's own by default.
        steps: Steps of the training attack; the method's own by default.
        method_options: More options of the method, such as {"k": 1.0}.
        epochs: Passes over the training data.
        batch_size: Images a step, over all processes together.
        optimizer: sgd, adamw or deat.
        lr: Peak learning rate.
        momentum: Of SGD.
        weight_decay: Weight decay.
        optimizer_options: More options of the optimiser, such as {"k1": 1.0, "k2": 0.8, "decoupled": true} for deat.
        schedule: onecycle, step, cosine or constant.
        warmup: Share of a one-cycle run in which the rate rises.
        milestones: Epochs after which a step schedule divides the rate by ten; 1/2 and 3/4 of the run by default.
        augment: crop_flip, crop or none.
        val_fraction: Share of the training data that chooses the best epoch; 0 trains without validation.
        val_steps: PGD steps of the validation attack (step size 2.5 eps / steps).
        imbalance_ratio: Smallest over largest class, for a long-tailed training set.
        imbalance_kind: exp (each class a fixed share of the one before) or step (half of the classes are small).
        label_noise: Share of training labels drawn anew at random.
        label_noise_kind: uniform (over all classes) or other (never the true one).
        image_size: Side in pixels to which the images of a folder are brought.
        train_size: Train on that many images, as evenly over the classes as they allow.
        precision: fp32 or bf16.
        channels_last: Memory format of convolutions and images.
        compile: Compile the model with torch.compile; a text is its mode, such as reduce-overhead for CUDA graphs.
        ema: Decay of the weights' exponential moving average, such as 0.995; it is then what is evaluated.
        clip_grad: Largest L2 norm of the gradient.
        seed: Of initial weights, order, augmentation and attacks.
        data_seed: Of the validation split, long tail and label noise.
        resume: Go on with the run in OUT; false refuses a directory that holds one.
        progress: Show progress bars (on a terminal).

    Returns:
        The run directory.

    Raises:
        ValueError, TypeError, FileNotFoundError: Settings that cannot be right; each says what to do.
        FloatingPointError: The loss was not finite; the last checkpoint is whole.
    """
    settings = dict(locals())
    eps = check_eps(parse_fraction(eps))
    with processes.connected() as device:
        _fit(settings, eps, device)
    return RunDirectory(out)


def _fit(settings: dict, eps: float, device: torch.device) -> None:
    """Build everything that the settings name, and train."""
    options = {key: settings[key] for key in ("imbalance_ratio", "imbalance_kind", "image_size", "val_fraction")}
    noise = None if settings["label_noise"] is None else (settings["label_noise"], settings["label_noise_kind"])
    splits = load_dataset(
        settings["data"], root=settings["root"], label_noise=noise, seed=settings["data_seed"], **options
    )
    if settings["train_size"] is not None:
        splits.train = splits.train.subset(settings["train_size"], seed=settings["data_seed"])
        splits.class_counts = splits.train.class_counts
    net = _model(settings, splits).to(device)
    method = _method(settings, net, splits, eps)
    train_batches, val_batches = _loaders(settings, splits, device)
    optimizer = create_optimizer(
        net,
        settings["optimizer"],
        **{key: settings[key] for key in ("lr", "momentum", "weight_decay")},
        **(settings["optimizer_options"] or {}),
    )
    scheduler = create_scheduler(
        optimizer,
        settings["schedule"],
        steps_per_epoch=len(train_batches),
        **{key: settings[key] for key in ("epochs", "warmup", "milestones")},
    )
    val_steps = settings["val_steps"]
    same = ("epochs", "precision", "channels_last", "compile", "ema", "clip_grad", "resume", "seed", "progress")
    trainer = Trainer(
        method,
        optimizer,
        scheduler=scheduler,
        val_attack=lambda m: PGD(m, eps=eps, alpha=2.5 * eps / val_steps, steps=val_steps),
        run_dir=settings["out"],
        config=_config(settings, net, splits, eps),
        class_counts=splits.class_counts if is_long_tailed(splits.class_counts) else None,
        **{key: settings[key] for key in same},
    )
    trainer.fit(train_batches, val_batches)


def _model(settings: dict, splits: Splits) -> nn.Module:
    """Build the model; its first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(settings["seed"])
        return create_model(
            settings["model"],
            splits.num_classes,
            mean=settings["mean"],
            std=settings["std"],
            in_chans=splits.image_shape[0],
            **(settings["model_options"] or {}),
        )


def _method(settings: dict, net: nn.Module, splits: Splits, eps: float) -> Method:
    """Build the method with those of the common options that were given or that it takes."""
    options = dict(settings["method_options"] or {})
    if settings["alpha"] is not None:
        options["alpha"] = parse_fraction(settings["alpha"])
    if settings["steps"] is not None:
        options["steps"] = settings["steps"]
    offered = {"eps": eps, "seed": settings["seed"], "class_counts": splits.class_counts}
    return create_method(settings["method"], net, offered=offered, **options)


def _loaders(settings: dict, splits: Splits, device: torch.device):
    world = processes.world_size()
    if settings["batch_size"] % world:
        raise ValueError(f"batch_size {settings['batch_size']} cannot be shared out over {world} processes")
    shared = {"device": device, "rank": processes.rank(), "world_size": world}
    train_batches = make_loader(
        splits.train,
        settings["batch_size"] // world,
        augment=settings["augment"],
        generator=torch.Generator().manual_seed(settings["seed"]),
        drop_last=len(splits.train) >= settings["batch_size"],
        **shared,
    )
    if splits.val is None:
        return train_batches, None
    return train_batches, make_loader(splits.val, VAL_BATCH, shuffle=False, **shared)


def _config(settings: dict, net: nn.Module, splits: Splits, eps: float) -> dict:
    """Return what ``config.yaml`` says, grouped by what it is about; where it came from is left out."""
    groups = {
        "data": ("data", "root", "val_fraction", "imbalance_ratio", "imbalance_kind", "label_noise",
                 "label_noise_kind", "image_size", "train_size", "data_seed"),
        "method": ("method", "alpha", "steps", "method_options"),
        "training": ("epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "optimizer_options",
                     "schedule", "warmup", "milestones", "augment", "val_steps", "precision", "channels_last",
                     "compile", "ema", "clip_grad"),
    }  # fmt: skip
    config = {name: {key: settings[key] for key in keys} for name, keys in groups.items()}
    config["data"] = {"name": config["data"].pop("data")} | config["data"] | {"class_counts": splits.class_counts}
    config["method"] = {"name": config["method"].pop("method"), "eps": eps} | config["method"]
    return {"model": net.recipe} | config | {"seed": settings["seed"], "versions": versions()}
