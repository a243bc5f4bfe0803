"""Weights from a file that any training program wrote, loaded into a model: containers, prefixes, clear refusals."""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import pickletools
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from at_extensions.checks import check_model
from at_extensions.runs import load_tensors

CONTAINERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "shadow",
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights",
)  # fmt: skip
"""Keys under which training programs keep weights, the preferred ones first: averaged weights before raw ones."""

_WRAPPERS = ("module", "_orig_mod")  # parts of names that DataParallel, DDP, timm's EMA and torch.compile put in
_MEANS, _STDS = ("mean", "mu", "new_mean", "means"), ("std", "sigma", "new_std", "stds", "sds")
_USUAL = ("torch._utils", "torch.storage", "collections.", "torch.nn.parameter", "torch.FloatStorage", "torch._tensor")
_SHOWN = 5  # tensors that an error names


class Loaded(NamedTuple):
    """The place in a file from which a model's weights were taken.

    Attributes:
        container: Keys of the dictionaries that held them, joined by dots; empty for a plain state dict.
        prefix: Beginning of their names that the model does not have, such as ``"model."``; ``module.`` and
            ``_orig_mod.`` are left out of names before.
        unused: Names of tensors outside the prefix, which belong to something else.
    """

    container: str
    prefix: str
    unused: tuple[str, ...]


class _Match(NamedTuple):
    """One way to read the tensors of a file as a module's."""

    target: nn.Module
    prefix: str
    found: dict[str, str]  # the target's name -> the file's
    missing: list[str]
    unknown: list[str]
    misshapen: list[str]
    unused: list[str]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unknown or self.misshapen)


def load_weights(model: nn.Module, path: str | Path, *, key: str | None = None) -> Loaded:
    """Load weights into a model of the same architecture, in place, whatever program saved them.

    Safetensors, or a PyTorch file (``.pt``, ``.pth``, ``.ckpt``, ``.bin``) read with ``weights_only=True``: a state
    dict, or one inside any nesting of the dictionaries in ``CONTAINERS``. Names may carry prefixes: ``module.`` and
    ``_orig_mod.`` anywhere, and one common beginning, such as Lightning's ``model.``. A model of ``create_model`` takes
    weights that were saved with its normalisation or without.

    Args:
        model: Changed in place, unless an error is raised.
        path: The file.
        key: Which of several sets of weights to take: a container (``"state_dict"``; ``"ema.shadow"`` nested), or a
            prefix of names (``"student"``). None takes averaged weights before raw ones, with a warning.

    Returns:
        The place in the file where the weights were.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged; a pickle of more than weights; of another architecture; several sets of weights; or a
            normalisation that the model does not have. The model is then unchanged.
    """
    check_model(model)
    tensors, container = read_weights(path, key)
    match = _best_match(model, tensors, path)
    strange = [name for name in (*match.unknown, *match.unused) if not _is_normalisation_of(model, name, tensors[name])]
    _refuse_normalisation(path, {name: tensors[name] for name in strange})
    match = match._replace(
        unknown=[name for name in match.unknown if name in strange],
        unused=[name for name in match.unused if name in strange],
    )
    if not match.fits:
        raise ValueError(f"{path} is a checkpoint of another architecture: tensors {_differences(match, tensors)}")
    if match.unused:
        warnings.warn(f"{path}: {_listed('not used', match.unused)}", stacklevel=2)
    own = match.target.state_dict()
    match.target.load_state_dict(own | {name: tensors[given] for name, given in match.found.items()})
    return Loaded(container, match.prefix, tuple(match.unused))


def read_weights(path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read the tensors of a weights file, by name, and the container that held them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged, more than tensors, or no weights under ``key``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    with open(path, "rb") as file:
        begin = file.read(9)
    if path.suffix == ".safetensors" or begin[8:] == b"{":
        data: Any = load_tensors(path)[0]
    else:
        data = _read_pytorch(path)
    steps = _steps_to(data, key)
    tensors, places = _find(data, path, steps)
    if key is not None and not steps:
        plain = _plain_names(tensors)
        tensors = {name: tensors[name] for short, name in plain.items() if f"{short}.".startswith(f"{key}.")}
        if not tensors:
            raise ValueError(f"{path} holds no weights under {key!r}; it holds {_contents(data)}")
    return tensors, ".".join(places)


def _steps_to(data: Any, key: str | None) -> list[str]:
    """Return the keys that lead to the container ``key``; none where it is no container."""
    if key is None or not isinstance(data, Mapping):
        return []
    if isinstance(data.get(key), Mapping):
        return [key]
    steps, inside = key.split("."), data
    for step in steps:
        inside = inside.get(step) if isinstance(inside, Mapping) else None
    return steps if isinstance(inside, Mapping) else []


def _find(data: Any, path: Path, steps: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Descend into containers, the given ones first, down to named tensors."""
    places = []
    for step in steps:
        data, places = data[step], [*places, step]
    while inside := [k for k in CONTAINERS if isinstance(data, Mapping) and isinstance(data.get(k), Mapping)]:
        if len(inside) > 1:
            warnings.warn(
                f"{path} holds weights under {', '.join(inside)}; {inside[0]} was taken, and key={inside[1]!r} "
                f"(--weights-key {inside[1]}) takes others",
                stacklevel=4,
            )
        data, places = data[inside[0]], [*places, inside[0]]
    tensors = {k: t for k, t in data.items() if isinstance(t, Tensor)} if isinstance(data, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path} holds no state dict, but {_contents(data)}")
    return tensors, places


def _contents(data: Any) -> str:
    """Describe the contents of a file briefly."""
    if not isinstance(data, Mapping):
        return f"a {type(data).__name__}"
    keys = [str(k) for k in data]
    return "the keys " + ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "") if keys else "nothing"


def _read_pytorch(path: Path) -> Any:
    try:
        with _harmless_types():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript archive, which holds a program and is not run; write its weights alone: "
                "torch.save(torch.jit.load(PATH).state_dict(), 'weights.pt')"
            ) from error
        objects = _pickled_objects(path)
        if not objects:
            raise ValueError(f"{path} is damaged, or no weights file: {str(error).splitlines()[0][:200]}") from error
        raise ValueError(
            f"{path} holds more than tensors: it pickles {', '.join(objects[:_SHOWN])}, and reading that would run "
            "code, so it was refused. If it is a whole model or a checkpoint of your own, write the weights alone in "
            "the program that made it: torch.save(model.state_dict(), 'weights.pt')"
        ) from error


@contextlib.contextmanager
def _harmless_types() -> Iterator[None]:
    """Let ``torch.load`` take types without side effects that training programs keep beside weights: options, paths.

    Numbers of NumPy are among them: their constructors make numbers of bytes and of nothing else.
    """
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # torch 2.5
    if safe_globals is None:
        yield
        return
    import numpy as np

    try:
        from numpy._core.multiarray import scalar
    except ImportError:  # NumPy 1
        from numpy.core.multiarray import scalar
    kinds = (np.float64, np.float32, np.int64, np.int32, np.bool_)
    dtypes = [type(np.dtype(kind)) for kind in kinds]
    paths = [pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with safe_globals([argparse.Namespace, *names, np.dtype, *dtypes, *paths]):
        yield


def _pickled_objects(path: Path) -> list[str]:
    """List the globals that a PyTorch file's pickles name beside torch's own; nothing of them is run."""
    found: list[str] = []
    texts: list[str] = []
    with contextlib.suppress(Exception):  # a file that is no pickle ends the list
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                stream = io.BytesIO(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
        else:
            stream = io.BytesIO(path.read_bytes())
        while True:  # files before torch 1.6 hold several pickles, one after the other
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    found.append(argument.replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    found.append(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    return list(dict.fromkeys(name for name in found if not name.startswith(_USUAL)))


def _best_match(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> _Match:
    """Choose the module (the model, or the network inside its normalisation) and the prefix that fit best."""
    given = _plain_names(tensors)
    matches = [
        _match(target, prefix, tensors, given) for target in _targets(model) for prefix in _prefixes(target, given)
    ]
    for target in _targets(model):
        fitting = [m for m in matches if m.target is target and m.fits]
        if fitting:
            _refuse_several(fitting, tensors, path)
            twice = {name for other in fitting[1:] for name in other.found.values()}
            return fitting[0]._replace(unused=[name for name in fitting[0].unused if name not in twice])
    return max(matches, key=lambda m: (len(m.found) - len(m.misshapen), -len(m.unknown)))


def _targets(model: nn.Module) -> list[nn.Module]:
    network = getattr(model, "network", None)
    return [model, network] if isinstance(network, nn.Module) and _normalises(model) else [model]


def _normalises(model: nn.Module) -> bool:
    """Whether a module subtracts a mean and divides by a std of its own, as those of ``create_model`` do."""
    return isinstance(getattr(model, "mean", None), Tensor) and isinstance(getattr(model, "std", None), Tensor)


def _plain_names(names: Any) -> dict[str, str]:
    """Return names without the parts that wrappers put in -> the names as they are."""
    plain: dict[str, str] = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        plain[".".join(parts) or name] = name
    return plain if len(plain) == len(names) else {name: name for name in names}


def _prefixes(target: nn.Module, given: Mapping[str, str]) -> list[str]:
    """Return beginnings of names that, cut off, leave names of the target's; the shortest and the empty one first."""
    own = _plain_names(target.state_dict())
    counts: Counter[str] = Counter({"": 0})
    for name in given:
        parts = name.split(".")
        counts.update(
            prefix + "." * bool(prefix)
            for prefix, rest in ((".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts)))
            if rest in own
        )
    likely = [prefix for prefix, _ in counts.most_common(20)]
    return sorted({*likely, ""}, key=lambda prefix: (len(prefix), prefix))


def _match(target: nn.Module, prefix: str, tensors: Mapping[str, Tensor], given: Mapping[str, str]) -> _Match:
    state = {name: t for name, t in target.state_dict().items() if isinstance(t, Tensor)}
    own = _plain_names(state)
    found = {name: given[prefix + plain] for plain, name in own.items() if prefix + plain in given}
    missing = [n for n in state if n not in found and not n.endswith("num_batches_tracked")]  # older files lack it
    inside = [original for plain, original in given.items() if plain.startswith(prefix)]
    taken = set(found.values())
    return _Match(
        target,
        prefix,
        found,
        missing,
        [name for name in inside if name not in taken],
        [n for n, g in found.items() if _kind(state[n]) != _kind(tensors[g])],
        [name for plain, name in given.items() if not plain.startswith(prefix)],
    )


def _kind(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.is_floating_point()


def _refuse_several(fitting: list[_Match], tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse to choose between sets of weights that differ, such as a student's and a teacher's."""
    first = fitting[0]
    for other in fitting[1:]:
        if any(not torch.equal(tensors[first.found[n]], tensors[other.found[n]]) for n in first.found):
            names = [m.prefix.removesuffix(".") or "(no prefix)" for m in (first, other)]
            raise ValueError(
                f"{path} holds these tensors more than once, under {names[0]} and {names[1]}; choose with "
                f"key={names[1]!r} (--weights-key {names[1]})"
            )


def _is_normalisation_of(model: nn.Module, name: str, value: Tensor) -> bool:
    """Whether a tensor of a file is the mean or std that the model normalises with already."""
    last = name.rpartition(".")[2]
    if not _normalises(model) or last not in _MEANS + _STDS:
        return False
    own = (model.mean if last in _MEANS else model.std).detach().cpu().flatten()
    return value.numel() in (1, own.numel()) and bool(torch.allclose(value.flatten().to(own), own, atol=1e-6))


def _refuse_normalisation(path: str | Path, strange: Mapping[str, Tensor]) -> None:
    """Refuse weights that come with a normalisation which would be dropped."""
    found = {n: t for n, t in strange.items() if n.rpartition(".")[2] in _MEANS + _STDS and t.numel() <= 16}
    if found:
        values = ", ".join(f"{n} = {[round(v, 4) for v in t.flatten().tolist()]}" for n, t in found.items())
        raise ValueError(
            f"{path} brings a normalisation that the model does not have: {values}; build the model with it: "
            "create_model(..., mean=, std=), or --mean and --std"
        )


def _differences(match: _Match, tensors: Mapping[str, Tensor]) -> str:
    state = match.target.state_dict()
    shapes = [
        f"{n}: {tuple(tensors[match.found[n]].shape)} in the file, {tuple(state[n].shape)} in the model"
        for n in match.misshapen
    ]
    parts = (("missing", match.missing), ("unknown", match.unknown), ("of another shape", shapes))
    return ", ".join(_listed(label, names) for label, names in parts if names)


def _listed(label: str, names: list[str]) -> str:
    return f"{len(names)} {label} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
