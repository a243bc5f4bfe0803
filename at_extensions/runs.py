"""Reading and writing a run directory: config, metrics, checkpoints, results; every write is atomic."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from at_extensions.checks import check_name

KINDS = ("last", "best")
"""The checkpoints of a run: the newest, and the best by validation robust accuracy."""

OWN_CHECKPOINT = "own checkpoint"
"""The method in ``config.yaml`` of a run that was made of a user's checkpoint: its training is not on record."""


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the name of ``path`` when the block ends without an exception.

    A kill at any moment leaves the old file or the new one, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_UMASK)  # mkstemp's and safetensors' 0600 would keep a shared run from its readers
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def _naming(path: str | Path, failure: type[Exception]) -> Iterator[None]:
    """Raise the writer's own kind of error as an OSError that names the file."""
    try:
        yield
    except (failure, OSError) as error:
        raise OSError(f"{path} cannot be written ({error}); is the disk full?") from error


def check_writable(folder: str | Path) -> Path:
    """Return ``folder``, made if it is missing, if files can be written into it.

    Raises:
        OSError: They cannot; the error names the folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise type(error)(error.errno, f"cannot write into {folder}: {error.strerror}") from error


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically and return its path."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, data: dict | list) -> Path:
    """Write indented JSON atomically and return its path."""
    return write_text(path, json.dumps(data, indent=2) + "\n")


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write tensors as safetensors, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors refuses views that share memory and strided layouts such as channels_last
    owned = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with atomic(path) as temporary, _naming(path, SafetensorError):
        save_file(owned, temporary, metadata=metadata)
    return Path(path)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors on the CPU, and its metadata.

    The file is opened once, so that both are of one piece though a trainer replace it meanwhile; ``safe_open`` opens it
    twice.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Truncated, or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, header.get("__metadata__", {})
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def save_weights(model: nn.Module, path: str | Path) -> Path:
    """Write a model's state dict as safetensors, with the recipe that rebuilds it where it carries one.

    Names are those of the model itself: modules that wrap it or a part of it (``torch.compile``, ``DataParallel``,
    ``DistributedDataParallel``, averaged models) leave no trace in them.
    """
    return save_state_dict(plain_state_dict(model), model, path)


def save_state_dict(state: dict[str, Tensor], model: nn.Module, path: str | Path) -> Path:
    """Write weights that ``plain_state_dict`` returned for a model of this architecture, as ``save_weights`` does."""
    recipe = getattr(unwrapped(model), "recipe", None)
    metadata = {"format": "pt"} | ({} if recipe is None else {"recipe": json.dumps(recipe)})
    return save_tensors(path, state, metadata)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``'s module, ``DataParallel``, an averaged model, or several of them."""
    while (inside := _inside(model)) is not None:
        model = getattr(model, inside)
    return model


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict under the names that it has without wrapping modules, at any depth."""
    state, plain = model.state_dict(), _plain_names(model)
    return {plain[name]: value for name, value in state.items() if plain[name] is not None}


def load_plain_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict from ``plain_state_dict`` into a model that may be wrapped, or not, in another way.

    Raises:
        RuntimeError: Of torch, for another architecture.
    """
    own, plain = model.state_dict(), _plain_names(model)
    named = {short: name for name, short in plain.items() if short is not None}
    wrappers = {name: own[name] for name, short in plain.items() if short is None}
    model.load_state_dict({named.get(name, name): value for name, value in state.items()} | wrappers)


_WRAPPERS = {  # class -> the attribute that holds the model
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}


def _inside(module: nn.Module) -> str | None:
    """Return the name under which a wrapping module holds the wrapped one; None for any other module."""
    for kind in type(module).__mro__:
        if (name := _WRAPPERS.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return name
    return None


def _plain_names(model: nn.Module) -> dict[str, str | None]:
    """Return each name in a model's state dict without wrapping modules; None for a wrapper's own entries."""
    wrapping = {name: _inside(module) for name, module in model.named_modules(remove_duplicate=False)}
    return {key: _plain_name(key, wrapping) for key in model.state_dict()}


def _plain_name(key: str, wrapping: dict[str, str | None]) -> str | None:
    path, plain = "", []
    for part in key.split("."):
        inside = wrapping.get(path)
        if inside is None:
            plain.append(part)
        elif part != inside:
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(plain)


def read_recipe(path: str | Path) -> dict | None:
    """Return the recipe in a checkpoint's header, or None where it names none.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Truncated, no safetensors file, or a header that holds something else under that name.
    """
    text = load_tensors(path)[1].get("recipe")
    if text is None:
        return None
    try:
        recipe = json.loads(text)
    except json.JSONDecodeError:
        recipe = None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no recipe of this package but {text[:80]!r}; build the model yourself")
    return recipe


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    import platform
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("at-extensions", "torch", "torchvision", "torchattacks", "timm", "robustbench", "pyautoattack"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class RunDirectory:
    """A folder that holds one training run and its results.

    ``config.yaml``, ``metrics.jsonl`` (one line an epoch), ``checkpoints/{last,best}.safetensors`` with a state file
    beside them, ``checkpoints/epoch-0010.safetensors`` where epochs are kept, and later ``evaluation.json``,
    ``examples.safetensors`` and ``report.html``.

    Args:
        path: The folder; made when something is first written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    def config(self) -> dict:
        """Return the run's configuration, empty if none was written.

        Raises:
            ValueError: ``config.yaml`` is not a YAML mapping.
        """
        return _read(self.path / "config.yaml", yaml.safe_load, {})

    def write_config(self, config: dict) -> None:
        """Write the run's configuration."""
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def metrics(self) -> list[dict]:
        """Return one dict an epoch, in order; a last line that a kill cut short is dropped.

        Raises:
            ValueError: Any other line is no JSON object.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        *whole, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = [_row(path, number, line) for number, line in enumerate(whole, 1) if line.strip()]
        with contextlib.suppress(ValueError):
            rows.append(_row(path, len(whole) + 1, rest))
        return rows

    def write_metrics(self, rows: list[dict]) -> None:
        """Write every epoch's metrics anew."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def weights(self, kind: str = "best") -> Path:
        """Return the path of the ``"best"`` or ``"last"`` weights.

        Raises:
            ValueError: Another kind.
        """
        return self.path / "checkpoints" / f"{check_name('checkpoint', kind, KINDS)}.safetensors"

    def kept_path(self, epoch: int) -> Path:
        """Return the path of the weights that are kept of an epoch, counted from 1."""
        return self.path / "checkpoints" / f"epoch-{epoch:04d}.safetensors"

    def kept(self) -> dict[int, Path]:
        """Return the weights that were kept of single epochs (``keep_every``): epoch -> path, in order."""
        found = (
            re.fullmatch(r"epoch-(\d{4,})", path.stem) for path in self.path.glob("checkpoints/epoch-*.safetensors")
        )
        epochs = sorted(int(match[1]) for match in found if match)
        return {epoch: self.kept_path(epoch) for epoch in epochs}

    def published_weights(self) -> Path:
        """Return the best weights, or the last ones of a run that had no validation split.

        Raises:
            FileNotFoundError: The run has no checkpoint yet.
        """
        for kind in ("best", "last"):
            if self.weights(kind).is_file():
                return self.weights(kind)
        raise FileNotFoundError(f"{self.path} holds no checkpoint; is it a run directory?")

    def state_path(self, kind: str = "last") -> Path:
        """Return the path of the state that a run goes on from."""
        return self.weights(kind).with_suffix(".state.pt")

    def save_state(self, state: dict) -> None:
        """Write the whole training state (tensors, numbers, strings and their containers), atomically."""
        with atomic(self.state_path()) as temporary, _naming(self.state_path(), RuntimeError):
            torch.save(state, temporary)

    def load_state(self, kind: str = "last") -> dict | None:
        """Return the training state of the ``"last"`` or ``"best"`` epoch, or None if there is none.

        Raises:
            ValueError: The file is truncated or not one of ours.
        """
        path = self.state_path(kind)
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file; all mean the same to the user
            raise ValueError(f"{path} is truncated or foreign; delete it to start this run anew") from error

    def evaluation(self) -> dict | None:
        """Return the content of ``evaluation.json``, or None."""
        return _read(self.path / "evaluation.json", json.loads, None)

    def write_evaluation(self, report: dict, examples: dict[str, Tensor] | None = None) -> None:
        """Write an evaluation and a few of its adversarial examples."""
        if examples:
            save_tensors(self.path / "examples.safetensors", examples)
        write_json(self.path / "evaluation.json", report)

    def examples(self) -> dict[str, Tensor] | None:
        """Return images, adversarial, labels, clean_predictions and adversarial_predictions, or None."""
        path = self.path / "examples.safetensors"
        return load_tensors(path)[0] if path.exists() else None


def _row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} is no JSON object: {line[:80]}")
    return row


def find_runs(folder: str | Path) -> list[RunDirectory]:
    """Return the run directories in a folder, at any depth and in the order of their paths; it may be one itself.

    Raises:
        FileNotFoundError: No such folder, or none that holds a config.yaml with metrics or checkpoints.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found = sorted(path.parent for path in folder.rglob("config.yaml"))
    runs = [
        RunDirectory(path) for path in found if (path / "metrics.jsonl").exists() or (path / "checkpoints").exists()
    ]
    if not runs:
        raise FileNotFoundError(f"{folder} holds no run directory; train first: at-extensions train {folder}/NAME")
    return runs


def _read(path: Path, parse: Callable, default):
    if not path.exists():
        return default
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not hold a mapping")
    return data
