"""The one training loop: any method, any optimiser, one process or several, and a run directory that survives kills."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchattacks.attack import Attack
from tqdm.auto import tqdm

from at_extensions import processes
from at_extensions.attacks import PGD, attacking
from at_extensions.checks import (
    check_class_counts,
    check_count,
    check_images,
    check_labels,
    check_logits,
    check_matching,
    check_name,
    check_number,
    device_of,
    is_about_a_view,
    looks_like_probabilities,
)
from at_extensions.methods import Method
from at_extensions.runs import RunDirectory
from at_extensions.training.checkpoint import Checkpointer
from at_extensions.training.metrics import EpochSums, autocast, merged, numbers, validate
from at_extensions.training.schedule import learning_rate

PRECISIONS = ("fp32", "bf16")


@dataclass
class History:
    """Metrics of a run, one dict an epoch.

    Attributes:
        rows: ``epoch`` (from 1), ``lr``, ``train_loss``, ``train_accuracy`` (on what was trained on), where there is a
            validation split ``val_clean_accuracy`` and ``val_robust_accuracy``, and ``seconds``. With class counts
            ``per_class`` and ``groups`` (head, medium, tail): dicts of accuracies by ``train``, ``val_clean``,
            ``val_robust``.
        best_epoch: The epoch whose weights are ``best``; None without validation.
    """

    rows: list[dict] = field(default_factory=list)
    best_epoch: int | None = None

    def to_dict(self) -> dict:
        """Return plain data."""
        return {"rows": self.rows, "best_epoch": self.best_epoch}

    def __repr__(self) -> str:
        keys = list(dict.fromkeys(key for row in self.rows for key in numbers(row)))
        lines = [" ".join(f"{key:>19}" for key in keys)]
        for row in self.rows:
            cells = (f"{row[k]:>19.4g}" if isinstance(row.get(k), float) else f"{row.get(k, ''):>19}" for k in keys)
            lines.append(" ".join(cells) + (" best" if row.get("epoch") == self.best_epoch else ""))
        return "\n".join(lines)


class Trainer:
    """Trains a method's model: attack, forward, backward, step; validate, select and checkpoint once an epoch.

    Under ``torchrun`` it wraps ``DistributedDataParallel(method)``; give each process its part of the data
    (``make_loader(..., rank=, world_size=)``). A run directory makes the run resumable: interrupted and started again,
    it ends with the weights that it would have had (bit for bit on a CPU).

    Args:
        method: What turns a batch into a loss; its model is already on the device to train on.
        optimizer: Over the model's parameters.
        scheduler: Advanced once an optimiser step (see ``create_scheduler``); None keeps the rate.
        epochs: Passes over the training data.
        precision: ``"fp32"``, or ``"bf16"`` for autocast in attack and training pass.
        channels_last: Keep convolutions and images in that memory format.
        compile: Compile the model in place with ``torch.compile``, the attack's passes apart from the training's; a
            text is its mode, such as ``"reduce-overhead"`` for CUDA graphs. State-dict keys stay as they are.
        ema: Decay of an exponential moving average of the weights (timm's ModelEmaV3), such as 0.995; then the average
            is what is validated, selected and saved, and the raw weights stay in the state file.
        clip_grad: Largest L2 norm of the whole gradient; None does not clip.
        val_attack: Makes the attack of the validation from a model; None means PGD-10 at the training attack's eps with
            steps of eps / 4, or clean validation only where the method has no attack with an eps.
        run_dir: Where config, metrics and checkpoints go; None keeps nothing on disk.
        resume: Go on from the run directory's last checkpoint. False refuses a directory that holds a run.
        config: Written to ``config.yaml``; resuming a run with another one is refused.
        seed: Of the validation attack's random starts.
        progress: Show progress bars where standard error is a terminal.
        class_counts: Training images of each class (K,), to measure accuracy by class and by group every epoch.

    Raises:
        ValueError: A number out of range or an unknown precision.
        FileExistsError: ``resume=False`` and the directory holds a run.
    """

    def __init__(
        self,
        method: Method,
        optimizer: Optimizer,
        *,
        epochs: int,
        scheduler: LRScheduler | None = None,
        precision: str = "fp32",
        channels_last: bool = True,
        compile: bool | str = False,
        ema: float | None = None,
        clip_grad: float | None = None,
        val_attack: Callable[[nn.Module], Attack] | None = None,
        run_dir: str | Path | RunDirectory | None = None,
        resume: bool = True,
        config: dict | None = None,
        seed: int = 0,
        progress: bool = True,
        class_counts: Sequence[int] | None = None,
    ):
        self.method, self.optimizer, self.scheduler = method, optimizer, scheduler
        self.epochs = check_count("epochs", epochs)
        self.precision = check_name("precision", precision, PRECISIONS)
        self.clip_grad = clip_grad if clip_grad is None else check_number("clip_grad", clip_grad, above=0)
        self.seed, self.progress, self.channels_last = seed, progress, channels_last
        self.class_counts = None if class_counts is None else check_class_counts(class_counts)
        method.stream.seed += 7919 * processes.rank()  # each process starts its attacks elsewhere
        if channels_last:
            method.model.to(memory_format=torch.channels_last)
        self.ema = None if ema is None else _average(method.model, check_number("ema", ema, above=0, below=1))
        if compile:
            method.compile(**({"mode": compile} if isinstance(compile, str) else {}))
        make_attack = val_attack or _default_attack(method)
        self._val_attack = None if make_attack is None else make_attack(self.model)
        self.history = History()
        self._checkpoints = Checkpointer(run_dir, resume=resume, config=config)

    @property
    def model(self) -> nn.Module:
        """What is validated and published: the averaged model with EMA, else the method's."""
        return self.method.model if self.ema is None else self.ema.module

    def fit(self, train: Iterable, val: Iterable | None = None) -> History:
        """Train until ``epochs`` are done.

        Args:
            train: Yields (images, labels, index); with a ``state_dict()`` a resumed run sees the batches that the
                uninterrupted one would have seen.
            val: Yields (images, labels, ...); None trains without validation, and then no ``best`` is kept.

        Returns:
            The metrics of every epoch, those before an interruption included.

        Raises:
            FloatingPointError: A loss was not finite; nothing of that epoch is saved.
            TypeError, ValueError: Images, labels or logits that cannot be right (checked on the first batch).
        """
        wrapped = _wrap(self.method)
        done = self._resume(train)
        bar = self._bar(range(done, self.epochs), "epochs", initial=done, total=self.epochs)
        for epoch in bar:
            row = self._epoch(epoch + 1, wrapped, train, check=epoch == done)
            row = merged(row, self._validate(val))
            self._select(row)
            self._checkpoints.save(lambda: self._state(train), self.model)
            bar.set_postfix({k: f"{v:.3g}" for k, v in numbers(row).items() if k != "epoch"})
        return self.history

    def _state(self, train: Iterable) -> dict:
        """Return all that the coming epochs depend on; every process must call this."""
        return {
            "epoch": len(self.history.rows),
            "model": self.method.model.state_dict(),
            "method": {k: v for k, v in self.method.state_dict().items() if not k.startswith("model.")},
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "loader": train.state_dict() if hasattr(train, "state_dict") else None,
            "streams": processes.gather(self.method.stream.state_dict()),
            "rows": self.history.rows,
            "best_epoch": self.history.best_epoch,
        }

    def _resume(self, train: Iterable) -> int:
        """Go on where the run directory's last checkpoint was; return how many epochs are done."""
        state = self._checkpoints.load()
        if state is None:
            return 0
        try:
            self.method.model.load_state_dict(state["model"])
            _load_memory(self.method, state["method"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self.method.stream.load_state_dict(state["streams"][processes.rank()])
            if hasattr(train, "load_state_dict"):
                train.load_state_dict(state["loader"])
            self.history = History(state["rows"], state["best_epoch"])
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the checkpoint belongs to another model, method, optimiser or number of processes: {error}"
            ) from error
        return state["epoch"]

    def _epoch(self, epoch: int, wrapped: nn.Module, train: Iterable, *, check: bool) -> dict:
        started = time.perf_counter()
        self.method.train()
        device = device_of(self.method.model)
        sums = EpochSums(device, self.class_counts)
        for x, y, index in self._bar(train, f"epoch {epoch}", leave=False):
            x, y, index = self._place(device, x, y, index)
            if check:
                self._check(x, y)
                check = False
            with autocast(device, self.precision):
                step = wrapped(x, y, index)
            self._update(step.loss)
            sums.add(step, y)
        self.method.epoch_end()
        row = {"epoch": epoch, "lr": learning_rate(self.optimizer)} | sums.read()
        return row | {"seconds": time.perf_counter() - started}

    def _place(self, device: torch.device, x: Tensor, y: Tensor, index: Tensor | None):
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = x.to(device, non_blocking=True, memory_format=layout)
        index = index.to(device, non_blocking=True) if isinstance(index, Tensor) else index
        return x, y.to(device, non_blocking=True), index

    def _check(self, x: Tensor, y: Tensor) -> None:
        check_images(x)
        with attacking(self.method.model), torch.no_grad():
            try:
                logits = check_logits(self.method.model(x[:2]), len(x[:2]))
            except RuntimeError as error:
                if not (self.channels_last and is_about_a_view(error)):
                    raise
                raise ValueError(
                    "the model flattens its maps by view(), which channels_last does not allow; let it use flatten(), "
                    "or train with channels_last=False"
                ) from error
        if looks_like_probabilities(logits):
            raise ValueError(
                "the model returns probabilities, not logits; remove its softmax (cross-entropy applies its own)"
            )
        check_labels(y, logits.shape[1], size=len(x))
        if self.class_counts is not None:
            check_matching(len(self.class_counts), logits.shape[1])

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.method.model.parameters(), self.clip_grad)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.method.model)

    def _validate(self, val: Iterable | None) -> dict:
        if val is None:
            return {}
        started = time.perf_counter()
        processes.share_buffers(self.model)
        options = {"precision": self.precision, "seed": self.seed, "class_counts": self.class_counts}
        row = validate(self.model, val, self._val_attack, **options)
        return row | {"val_seconds": time.perf_counter() - started}

    def _select(self, row: dict) -> None:
        """Note the epoch if it is the best so far: by robust accuracy, or by clean where the method does not attack."""
        attacked = self.method.attack is not None and "val_robust_accuracy" in row
        key = "val_robust_accuracy" if attacked else "val_clean_accuracy"
        best = max((r[key] for r in self.history.rows if key in r), default=-1.0)
        self.history.rows.append(row)
        if row.get(key, -1.0) > best:
            self.history.best_epoch = row["epoch"]

    def _bar(self, iterable: Iterable, text: str, **options):
        silent = True if not (self.progress and processes.is_main()) else None  # None: silent off a terminal
        return tqdm(iterable, desc=text, disable=silent, dynamic_ncols=True, **options)


def _load_memory(method: Method, state: dict) -> None:
    """Load what a method remembers beside its model."""
    missing, unknown = method.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith("model.")]
    if missing or unknown:
        raise ValueError(f"the method remembers other things: missing {missing}, unknown {unknown}")


def _default_attack(method: Method) -> Callable[[nn.Module], Attack] | None:
    eps = getattr(method.attack, "eps", None)
    if eps is None:
        return None
    if isinstance(method.attack, torchattacks.PGDL2):
        return lambda model: torchattacks.PGDL2(model, eps=eps, alpha=eps / 4, steps=10)
    return lambda model: PGD(model, eps=eps, alpha=eps / 4, steps=10)


def _average(model: nn.Module, decay: float):
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay)


def _wrap(method: Method) -> nn.Module:
    if processes.world_size() == 1:
        return method
    device = device_of(method)
    return DistributedDataParallel(method, device_ids=[device] if device.type == "cuda" else None)
