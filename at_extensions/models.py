"""Image classifiers on inputs in [0, 1]: timm's, RobustBench's CIFAR networks, and one small CNN."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from at_extensions.checks import check_count, check_logits, check_model, check_name, device_of, unknown_name
from at_extensions.runs import read_recipe
from at_extensions.untouched import attacking, random_state_kept
from at_extensions.weights import load_weights

_PYTORCH = (".pt", ".pth", ".ckpt", ".bin")
_NOT_IN_RECIPE = ("pretrained", "checkpoint_path")  # where weights came from says nothing about the architecture


class Normalized(nn.Module):
    """A classifier of images in [0, 1] that normalises them itself: ``network((x - mean) / std)``.

    Attributes:
        network: The architecture, on normalised images.
        mean: Buffer (1, C, 1, 1).
        std: Buffer (1, C, 1, 1).
        recipe: The arguments of ``create_model`` that made it; None for a network from elsewhere.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], recipe: dict | None):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W) in [0, 1]."""
        return self.network((x - self.mean) / self.std)

    def get_classifier(self) -> nn.Module:
        """Return the network's last linear layer."""
        return classifier_of(self.network)


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions with BatchNorm and ReLU, then one linear layer: for images of 8 x 8 pixels and up."""

    def __init__(self, num_classes: int, in_chans: int = 3, width: int = 32):
        super().__init__()
        check_count("width", width)
        channels = (in_chans, width, width, 2 * width, 2 * width)
        layers: list[nn.Module] = []
        for i, stride in enumerate((1, 2, 1, 2)):
            layers += [
                nn.Conv2d(channels[i], channels[i + 1], 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(channels[i + 1]),
                nn.ReLU(inplace=True),
            ]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.classifier = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K)."""
        return self.classifier(self.features(x))


def _robustbench_resnet(block: str, blocks: Sequence[int], kind: str = "ResNet", **fixed) -> Callable[..., nn.Module]:
    def build(num_classes: int, in_chans: int, width: int = 64, **kwargs) -> nn.Module:
        from robustbench.model_zoo.architectures import resnet

        net = getattr(resnet, kind)(getattr(resnet, block), list(blocks), num_classes=num_classes, **fixed, **kwargs)
        if (check_count("width", width), in_chans) != (64, 3):
            _narrow(net, getattr(resnet, block), blocks, width, in_chans, num_classes)
        return net

    return build


def _narrow(net: nn.Module, block: type, blocks: Sequence[int], width: int, in_chans: int, num_classes: int) -> None:
    """Rebuild RobustBench's ResNet with another first width: its constructor fixes 64 and three channels."""
    net.in_planes = width
    net.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
    if isinstance(getattr(net, "bn1", None), nn.BatchNorm2d):
        net.bn1 = nn.BatchNorm2d(width)
    for i, count in enumerate(blocks):
        setattr(net, f"layer{i + 1}", net._make_layer(block, width * 2**i, count, stride=1 if i == 0 else 2))
    if isinstance(getattr(net, "bn", None), nn.BatchNorm2d):
        net.bn = nn.BatchNorm2d(8 * width * block.expansion)
    net.linear = nn.Linear(8 * width * block.expansion, num_classes)


def _wide_resnet(depth: int, widen: int) -> Callable[..., nn.Module]:
    def build(num_classes: int, in_chans: int, **kwargs) -> nn.Module:
        from robustbench.model_zoo.architectures.wide_resnet import WideResNet

        _three_channels("wide_resnet", in_chans)
        return WideResNet(depth=depth, widen_factor=widen, num_classes=num_classes, **kwargs)

    return build


def _dm_wide_resnet(depth: int, widen: int) -> Callable[..., nn.Module]:
    def build(num_classes: int, in_chans: int, **kwargs) -> nn.Module:
        from robustbench.model_zoo.architectures import dm_wide_resnet as dm

        kwargs = {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans, "activation_fn": dm.Swish} | kwargs
        return dm.DMWideResNet(num_classes=num_classes, depth=depth, width=widen, num_input_channels=in_chans, **kwargs)

    return build


def _three_channels(name: str, in_chans: int) -> None:
    if in_chans != 3:
        raise ValueError(f"{name} takes images of 3 channels, not {in_chans}; use small_cnn or a cifar_resnet instead")


_CIFAR: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": lambda num_classes, in_chans, **kwargs: SmallCNN(num_classes, in_chans, **kwargs),
    "cifar_resnet18": _robustbench_resnet("BasicBlock", (2, 2, 2, 2)),
    "cifar_resnet34": _robustbench_resnet("BasicBlock", (3, 4, 6, 3)),
    "cifar_resnet50": _robustbench_resnet("Bottleneck", (3, 4, 6, 3)),
    "preact_resnet18": _robustbench_resnet("PreActBlock", (2, 2, 2, 2), "PreActResNet", bn_before_fc=True),
    "wide_resnet_10_2": _wide_resnet(10, 2),
    "wide_resnet_16_2": _wide_resnet(16, 2),
    "wide_resnet_28_2": _wide_resnet(28, 2),
    "wide_resnet_28_10": _wide_resnet(28, 10),
    "wide_resnet_34_10": _wide_resnet(34, 10),
    "wide_resnet_70_16": _wide_resnet(70, 16),
    "dm_wide_resnet_28_10": _dm_wide_resnet(28, 10),
    "dm_wide_resnet_70_16": _dm_wide_resnet(70, 16),
}
_WIDE = re.compile(r"(dm_)?wide_resnet_(\d+)_(\d+)")


def _cifar_builder(name: str) -> Callable[..., nn.Module] | None:
    if name in _CIFAR:
        return _CIFAR[name]
    wide = _WIDE.fullmatch(name)
    if wide is None:
        return None
    depth, widen = int(wide[2]), int(wide[3])
    if (depth - 4) % 6 or depth < 10 or widen < 1:
        raise ValueError(f"{name}: a wide ResNet's depth is 6 n + 4 (10, 16, 22, 28, 34, ...) and its width at least 1")
    return (_dm_wide_resnet if wide[1] else _wide_resnet)(depth, widen)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that ``create_model`` takes: the CIFAR networks first, then timm's.

    Args:
        pattern: Shell-style wildcard, such as ``"*resnet*"``. Wide ResNets of any other depth and width
            (``wide_resnet_<depth>_<widen>``) exist too.
    """
    import fnmatch

    import timm

    return [n for n in _CIFAR if fnmatch.fnmatch(n, pattern)] + timm.list_models(pattern)


def create_model(
    name: str,
    num_classes: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    in_chans: int = 3,
    **kwargs,
) -> Normalized:
    """Build a classifier of images in [0, 1]; normalisation happens inside.

    Args:
        name: A name from ``list_models()``: a timm architecture; a CIFAR network as RobustBench defines it
            (``preact_resnet18`` with its BatchNorm before the classifier, ``cifar_resnet18`` post-activation,
            ``wide_resnet_<depth>_<widen>``, ``dm_wide_resnet_<depth>_<widen>`` with Swish); or ``small_cnn``.
        num_classes: Outputs K, at least 2.
        mean: Subtracted, one number a channel. None: timm's for its own architectures, else 0.
        std: Divided by. None: timm's for its own architectures, else 1.
        in_chans: Channels of the images.
        **kwargs: Passed to the architecture: ``pretrained=True`` for timm, ``width=16`` for a narrow ResNet.

    Returns:
        A module that maps (B, in_chans, H, W) in [0, 1] to logits (B, num_classes) and keeps its recipe.

    Raises:
        ValueError: Unknown name (the nearest ones are named) or numbers out of range.
    """
    num_classes = check_count("num_classes", num_classes, at_least=2)
    in_chans = check_count("in_chans", in_chans)
    build = _cifar_builder(name)
    if build is not None:
        network, own_mean, own_std = build(num_classes, in_chans, **kwargs), (0.0,) * in_chans, (1.0,) * in_chans
    else:
        network, own_mean, own_std = _timm_network(name, num_classes, in_chans, kwargs)
    mean, std = _per_channel("mean", mean, own_mean), _per_channel("std", std, own_std)
    if not all(s > 0 for s in std):
        raise ValueError(f"std must be positive, got {std}")
    options = {key: value for key, value in kwargs.items() if key not in _NOT_IN_RECIPE}
    recipe = {"name": name, "num_classes": num_classes, "mean": mean, "std": std, "in_chans": in_chans} | options
    return Normalized(network, mean, std, recipe)


def _timm_network(name: str, num_classes: int, in_chans: int, kwargs: dict):
    import timm

    if ":" not in name and not timm.is_model(name):
        raise unknown_name("model", name, [*_CIFAR, *timm.list_models()])
    network = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs)
    config = network.pretrained_cfg
    mean, std = config.get("mean", (0.0,)), config.get("std", (1.0,))
    if len(mean) != in_chans:  # timm adapts RGB weights to other channel counts; their mean is the grey level
        mean, std = (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
    return network, mean, std


def _per_channel(what: str, given: Sequence[float] | None, default: Sequence[float]) -> list[float]:
    values = [float(v) for v in (default if given is None else given)]
    if len(values) != len(default):
        raise ValueError(f"{what} needs one number a channel ({len(default)}), got {len(values)}")
    return values


def from_recipe(recipe: dict) -> Normalized:
    """Build the architecture that a recipe names, with fresh weights.

    Raises:
        ValueError: The recipe is not one of ``create_model``'s, or asks for weights from elsewhere.
    """
    if any(recipe.get(key) for key in _NOT_IN_RECIPE):  # a checkpoint's header must not make timm unpickle a file
        raise ValueError(f"a recipe names an architecture, not where weights come from: {recipe}")
    try:
        return create_model(**recipe)
    except TypeError as error:
        raise ValueError(f"not a recipe of create_model: {recipe} ({error})") from error


def recipe_of(model: nn.Module) -> dict | None:
    """Return the recipe that a model was made by, or None for a model that ``create_model`` did not make."""
    return getattr(model, "recipe", None)


def fresh_like(model: nn.Module, seed: int) -> nn.Module:
    """Build the same architecture with weights drawn anew; the global random state is left as it is.

    Args:
        model: Made by ``create_model``.
        seed: Decides the weights: the same seed gives the same weights, bit for bit.

    Returns:
        A module of the same architecture, device, dtype and mode.

    Raises:
        ValueError: The model carries no recipe; pass a callable of your own (``fresh=``) where one is taken.
    """
    recipe = recipe_of(check_model(model))
    if recipe is None:
        raise ValueError(
            f"{type(model).__name__} was not made by create_model, so its architecture cannot be replayed; "
            "pass fresh=, a callable seed -> module"
        )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        fresh = from_recipe(recipe)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return fresh.to(device=device_of(model), dtype=dtype).train(model.training)


def load_model(path: str | Path) -> Normalized:
    """Rebuild a trained model from a checkpoint (``*.safetensors``) that names its recipe.

    Args:
        path: A weights file that this package wrote, such as ``RUN/checkpoints/best.safetensors``; its names may carry
            prefixes, as ``load_weights`` takes them.

    Returns:
        The model on the CPU, in eval mode; global random state is left as it was.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Truncated, foreign, or of another architecture.
    """
    path = Path(path)
    foreign = path.is_file() and path.suffix in _PYTORCH
    recipe = None if foreign else read_recipe(path)
    if recipe is None:
        raise ValueError(
            f"{path} names no recipe; build the model yourself and use at_extensions.load_weights(model, path), or "
            f"evaluate it: at-extensions evaluate DIR --model NAME --weights {path}"
        )
    with random_state_kept():  # fresh weights are drawn before the file's replace them
        model = from_recipe(recipe)
    load_weights(model, path)
    return model.eval()


def classifier_of(model: nn.Module) -> nn.Module:
    """Return the last linear classifier of a model, which maps penultimate features to logits.

    Raises:
        ValueError: None is found: several heads, as in LeViT, or no linear layer.
    """
    if not isinstance(model, Normalized) and hasattr(model, "get_classifier"):
        head = model.get_classifier()
    elif isinstance(model, Normalized):
        return classifier_of(model.network)
    else:
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        head = linears[-1] if linears else None
    if not isinstance(head, (nn.Linear, nn.Conv2d)):
        kind = type(head).__name__
        raise ValueError(f"{type(model).__name__} has no single linear classifier ({kind}), so no penultimate features")
    return head


def logits_and_features(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run one forward pass and return logits (B, K) with the penultimate features (B, D), both with graph.

    The features are the input of the last linear classifier, caught by a hook that is removed afterwards.

    Raises:
        ValueError: The classifier cannot be found, or did not make the logits.
    """
    caught: list[tuple[Tensor, Tensor]] = []
    head = classifier_of(model)
    hook = head.register_forward_hook(lambda _, inputs, output: caught.append((inputs[0], output)))
    try:
        logits = model(x)
    finally:
        hook.remove()
    if not caught and model._compiled_call_impl is not None:
        raise ValueError(
            f"{type(model).__name__} was compiled by another forward pass in train mode, so features are out of reach; "
            "call torch.compiler.reset(), and leave forward passes in train mode to the method"
        )
    if len(caught) != 1 or caught[0][1].shape[0] != len(x) or caught[0][1].numel() != logits.numel():
        raise ValueError(f"{type(model).__name__}: the last linear layer does not make the logits")
    return logits, caught[0][0].flatten(1)


def check_fits(model: nn.Module, image: Tensor, data: str) -> nn.Module:
    """Return ``model`` if it takes images like ``image`` (C, H, W) in [0, 1]; ``data`` names their source in the error.

    Raises:
        ValueError: The model fails on such images, or its logits are not (B, K).
    """
    channels = (getattr(model, "recipe", None) or {}).get("in_chans", len(image))
    shape = " x ".join(str(side) for side in image.shape)
    if channels != len(image):  # normalisation would broadcast a single channel
        raise ValueError(f"the model does not take images of {shape} from {data}: it is made for {channels} channels")
    try:
        with attacking(model), torch.no_grad():
            check_logits(model(image[None].to(device_of(model))), 1)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the model does not take images of {shape} from {data}: {reason}") from error
    return model


def check_known(name: str) -> str:
    """Return ``name`` if ``create_model`` knows it, without building anything.

    Raises:
        ValueError: Unknown; the nearest names are given.
    """
    if _cifar_builder(name) is None and ":" not in name:
        check_name("model", name.split(".")[0], list_models())
    return name
