"""The one training loop: any method, any optimiser, one process or several, and a run directory that survives kills."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchattacks.attack import Attack

from at_extensions import processes
from at_extensions.attacks import set_range, validation_attack
from at_extensions.checks import (
    check_class_counts,
    check_count,
    check_images,
    check_matching,
    check_name,
    check_number,
    device_of,
)
from at_extensions.folding import to_channels_last
from at_extensions.methods import Method
from at_extensions.progress import bar
from at_extensions.runs import RunDirectory
from at_extensions.training._notice import OverfittingNotice
from at_extensions.training._preparing import average, check_observers, in_eval_mode, warn_of_slow_bf16, wrapped
from at_extensions.training._state import Snapshots, checkpoint, resume
from at_extensions.training.checkpoint import Checkpointer
from at_extensions.training.history import History
from at_extensions.training.metrics import EpochSums, autocast, merged, numbers, validate
from at_extensions.training.observers import Observer, RollBack, Stop
from at_extensions.training.schedule import learning_rate

PRECISIONS = ("fp32", "bf16")
SECONDS_BETWEEN_LINES = 60  # within an epoch, off a terminal


class Trainer:
    """Trains a method's model: attack, forward, backward, step; validate, select and checkpoint once an epoch.

    Under ``torchrun`` it wraps ``DistributedDataParallel(method)``; give each process its part of the data
    (``make_loader(..., rank=, world_size=)``). A run directory makes the run resumable: interrupted and started again,
    it ends with the weights that it would have had (bit for bit on a CPU).

    The constructor leaves its arguments as they are. ``fit`` trains the model's weights and buffers, and moves them to
    the memory format of ``channels_last``, where they stay; with ``compile`` the model stays compiled in place. The
    method's seed stays as given, though each process draws other random starts. Modules that are in eval mode while the
    model as a whole is in train mode, such as a BatchNorm that you froze by ``eval()``, stay in eval mode.

    Args:
        method: Turns a batch into a loss; its model is already on the device to train on.
        optimizer: Over the model's parameters.
        scheduler: Advanced once an optimiser step (see ``create_scheduler``); None keeps the rate.
        epochs: Passes over the training data, those before an interruption or an earlier ``fit`` included.
        precision: ``"fp32"``, or ``"bf16"`` for autocast in attack and training pass.
        channels_last: Keep convolutions and images in that memory format, unless the model has a layer with which a CPU
            cannot be trained in it (``folding.to_channels_last``).
        compile: Compile the model in place with ``torch.compile``, the attack's passes apart from the training's; a
            text is its mode, such as ``"reduce-overhead"`` for CUDA graphs. State-dict keys stay as they are.
        ema: Decay of an exponential moving average of the weights (timm's ModelEmaV3), such as 0.995; then the average
            is validated, selected and saved, and the raw weights stay in the state file.
        clip_grad: Largest L2 norm of the whole gradient; None does not clip.
        val_attack: Makes the attack of the validation from a model. None means ten steps in the norm and with the eps
            of the training attack (``attacks.validation_attack``), and clean validation for a method without an
            attack. False means clean validation.
        run_dir: Folder of config, metrics and checkpoints; None keeps nothing on disk.
        resume: Go on from the run directory's last checkpoint. False refuses a directory that holds a run.
        keep_every: Keep the weights of every so-many-th epoch in the run directory (``RunDirectory.kept``), beside the
            last and the best; None keeps none.
        config: Written to ``config.yaml``; resuming a run with another one is refused.
        seed: Of the validation attack's random starts.
        progress: Show progress: bars on a terminal, else a line an epoch.
        class_counts: Training images of each class (K,), to measure accuracy by class and by group every epoch.
        observers: Called each epoch, and each step where they ask for it; they may stop the run or roll it back
            (``training.observers``).
        max_rollbacks: How often observers may roll the run back; once more, and it ends where it would have begun anew.

    Raises:
        TypeError: Observers that are none.
        ValueError: A number out of range, an unknown precision, or ``keep_every`` without a run directory.
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
        val_attack: Callable[[nn.Module], Attack] | Literal[False] | None = None,
        run_dir: str | Path | RunDirectory | None = None,
        resume: bool = True,
        keep_every: int | None = None,
        config: dict | None = None,
        seed: int = 0,
        progress: bool = True,
        class_counts: Sequence[int] | None = None,
        observers: Sequence[Observer] = (),
        max_rollbacks: int = 3,
    ):
        self.method, self.optimizer, self.scheduler = method, optimizer, scheduler
        self.epochs = check_count("epochs", epochs)
        self.precision = check_name("precision", precision, PRECISIONS)
        self.clip_grad = clip_grad if clip_grad is None else check_number("clip_grad", clip_grad, above=0)
        self.seed, self.progress, self.channels_last, self.compile = seed, progress, channels_last, compile
        self.class_counts = None if class_counts is None else check_class_counts(class_counts)
        self.observers = check_observers(observers)
        self.max_rollbacks, self.rollbacks = check_count("max_rollbacks", max_rollbacks, at_least=0), 0
        self.ema = None if ema is None else average(method.model, check_number("ema", ema, above=0, below=1))
        self.history = History()
        self._val_attack = val_attack(self.model) if callable(val_attack) else val_attack
        self._frozen = in_eval_mode(method.model)
        self._checkpoints = Checkpointer(run_dir, resume=resume, config=config, keep_every=keep_every)
        self._wrapped: nn.Module | None = None
        self._prepared, self._checked = False, False
        self.val: Iterable | None = None
        self._events: list[dict] = []
        self._overfitting = OverfittingNotice(show=progress and method.attack is not None)
        self._asking: Observer | None = None
        if precision == "bf16":
            warn_of_slow_bf16(device_of(method.model))

    @property
    def model(self) -> nn.Module:
        """The model that is validated and published: the averaged one with EMA, else the method's."""
        return self.method.model if self.ema is None else self.ema.module

    def fit(self, train: Iterable, val: Iterable | None = None) -> History:
        """Train until ``epochs`` are done or an observer stops the run.

        A second call goes on after the epochs that are done: with a larger ``epochs`` it trains the rest.

        Args:
            train: Yields (images, labels) or (images, labels, index); with a ``state_dict()`` a resumed run sees the
                batches that the uninterrupted one would have seen.
            val: Yields (images, labels, ...); None trains without validation, and then no ``best`` is kept.

        Returns:
            The metrics of every epoch, those before an interruption included.

        Raises:
            FloatingPointError: A loss was not finite; nothing of that epoch is saved.
            RuntimeError: Observers of several processes ask for different things.
            TypeError, ValueError: Images, labels or logits that cannot be right: the first batch is checked in full, a
                later one raises when the epoch ends, before anything of it is saved; a loader without batches; a
                checkpoint of another run; a training attack from which no validation attack follows.
        """
        self._prepare(val)
        self._resume(train)
        with bar(text="epoch", total=self.epochs, initial=len(self.history.rows), show=self.progress) as epochs:
            try:
                while len(self.history.rows) < self.epochs and self.history.stopped is None:
                    self._epoch(train, val)
                    row = numbers(self.history.rows[-1])
                    epochs.set_postfix({key: f"{value:.3g}" for key, value in row.items() if key != "epoch"})
                    if len(self.history.rows) > epochs.n:
                        epochs.update()
                    self._overfitting.tell(self.history.rows)
            finally:
                self._wrapped = None
        return self.history

    def _prepare(self, val: Iterable | None) -> None:
        """Bring the model into the form in which it is trained."""
        if self._val_attack is None and val is not None and self.method.attack is not None:
            self._val_attack = validation_attack(self.method.attack)(self.model)
        if self._val_attack:
            set_range(self._val_attack, self.method.image_range)
        if self.method.model.training:
            self._frozen = in_eval_mode(self.method.model)
        self.val = val
        for observer in self.observers:
            observer.begin(self)
        if not self._prepared:
            if self.channels_last:
                self.channels_last = all(to_channels_last(m) for m in (self.method.model, self.model))
            if self.compile:
                self.method.compile(**({"mode": self.compile} if isinstance(self.compile, str) else {}))
            self._prepared = True
        self._spread()

    def _resume(self, train: Iterable) -> None:
        """Go on where the run directory's last checkpoint was; without one, where this trainer is."""
        state = self._checkpoints.load()
        if state is not None:
            resume(self, state, train)
            self._spread()
            self._checkpoints.mend(state, self.model)

    def _spread(self) -> None:
        """Give each process other random starts."""
        for stream in self.method.streams().values():
            stream.spread(processes.rank())

    def _epoch(self, train: Iterable, val: Iterable | None) -> None:
        """Train one epoch until its row is kept, however often it is rolled back."""
        epoch, done = len(self.history.rows) + 1, 0
        started, sums = time.perf_counter(), EpochSums(device_of(self.method.model), self.class_counts)
        snapshots = Snapshots(self, train, sums)
        while True:
            request, done = self._steps(epoch, train, sums, snapshots, skip=done)
            if not isinstance(request, RollBack):
                row = {"epoch": epoch, "lr": learning_rate(self.optimizer)} | sums.read(self.method.faults())
                self.method.epoch_end()
                row |= {"seconds": time.perf_counter() - started}
                row = merged(row, self._validate(val))
                row, request = self._observe(epoch, done, row, request)
            if not isinstance(request, RollBack):
                break
            if self.rollbacks == self.max_rollbacks:
                self._give_up(request, snapshots, done, train)
                return
            done, sums = self._roll_back(request, snapshots, done)
        self._keep(row, request, train)

    def _steps(
        self, epoch: int, train: Iterable, sums: EpochSums, snapshots: Snapshots, *, skip: int
    ) -> tuple[Stop | RollBack | None, int]:
        """Train on the batches after the first ``skip`` ones; return a request and the number of the last step."""
        self._train_mode()
        if self._wrapped is None:
            self._wrapped = wrapped(self.method)
        device, number = device_of(self.method.model), 0
        watching = [o for o in self.observers if type(o).after_step is not Observer.after_step]
        options = {"leave": False, "show": self.progress, "every": SECONDS_BETWEEN_LINES}
        for number, batch in enumerate(bar(train, f"epoch {epoch}, batch", **options), 1):
            if number <= skip:
                continue
            x, y, index = self._place(device, batch)
            if not self._checked:
                self._check(x, y, index)
            with autocast(device, self.precision):
                step = self._wrapped(x, y, index)
            self._update(step.loss)
            sums.add(step, y)
            for observer in watching:
                observer.after_step(number, step, y)
            snapshots.after(number, sums)
            request = self._ask(epoch, number)
            if request is not None:
                return request, number
        if number == 0:
            raise ValueError(
                "the training loader yields no batches; an iterator can be used only once, and drop_last leaves out a "
                "batch that is not full"
            )
        return None, number

    def _train_mode(self) -> None:
        self.method.train()
        for module in self._frozen:
            module.training = False

    def _place(self, device: torch.device, batch: Sequence) -> tuple[Tensor, Tensor, Tensor | None]:
        """Move a batch to the device; its index may be missing."""
        x, y, *rest = batch
        check_images(x, values=False)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = x.to(device, non_blocking=True, memory_format=layout)
        index = rest[0] if rest and isinstance(rest[0], Tensor) else None
        index = None if index is None else index.to(device, non_blocking=True)
        return x, y.to(device, non_blocking=True) if isinstance(y, Tensor) else y, index

    def _check(self, x: Tensor, y: Tensor, index: Tensor | None) -> None:
        """Check the first batch in full."""
        if self.method.num_classes is None:
            self.method.inspect(x, y, index)
        if self.class_counts is not None:
            check_matching(len(self.class_counts), self.method.num_classes)
        self._checked = True

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
        processes.share_buffers(self.model)
        if val is None:
            return {}
        started = time.perf_counter()
        options = {"precision": self.precision, "seed": self.seed, "class_counts": self.class_counts}
        options |= {"limits": self.method.image_range, "num_classes": self.method.num_classes}
        row = validate(self.model, val, self._val_attack or None, **options)
        return row | {"val_seconds": time.perf_counter() - started}

    def _ask(self, epoch: int, number: int) -> Stop | RollBack | None:
        """Let observers decide within an epoch, where it is their step."""
        due = [o for o in self.observers if o.check_every and number % o.check_every == 0]
        return self._decide(epoch, number, [(observer, observer.check(self.model)) for observer in due])

    def _observe(
        self, epoch: int, number: int, row: dict, request: Stop | RollBack | None
    ) -> tuple[dict, Stop | RollBack | None]:
        """Show observers the epoch's row; return it with what they add, and a request."""
        answers = []
        for observer in self.observers:
            answer = observer.after_epoch(epoch, self.model, row)
            asks = isinstance(answer, (Stop, RollBack))
            answers.append((observer, answer if asks else None))
            if answer is not None and not asks:
                row = merged(row, answer)
        return row, self._decide(epoch, number, answers) or request

    def _decide(self, epoch: int, number: int, answers: list) -> Stop | RollBack | None:
        """Return the request that is granted, the same in all processes: to roll back before to stop."""
        asked = [(observer, request) for observer, request in answers if request is not None]
        if answers:
            kinds = [(type(o).__name__, type(r).__name__, getattr(r, "steps", None)) for o, r in asked]
            everyone = processes.gather(kinds)
            if any(other != everyone[0] for other in everyone):
                raise RuntimeError(
                    f"observers ask for different things in different processes: {everyone}; their decisions must "
                    "depend on the epoch's row, or on values reduced over the processes"
                )
        if not asked:
            return None
        asked.sort(key=lambda pair: isinstance(pair[1], Stop))
        observer, request = asked[0]
        self._asking = observer
        event = {"event": "rollback" if isinstance(request, RollBack) else "stop", "observer": type(observer).__name__}
        self._events.append(event | {"epoch": epoch, "step": number, "reason": request.reason} | request.evidence)
        return request

    def _roll_back(self, request: RollBack, snapshots: Snapshots, now: int) -> tuple[int, EpochSums]:
        """Go back to a snapshot and apply the remedy; return the step from which to go on, and the sums until then."""
        self.rollbacks += 1
        back, sums = snapshots.go_back(now, request.steps, self._asking)
        self._events[-1]["back_to_step"] = back
        if request.remedy is not None:
            self._wrapped = None
            request.remedy(self)
            self._spread()
            snapshots.renew()
        return back, sums

    def _give_up(self, request: RollBack, snapshots: Snapshots, now: int, train: Iterable) -> None:
        """End the run where it would have begun anew once more."""
        snapshots.go_back(now, request.steps, self._asking)
        self._events[-1] |= {"event": "stop", "rollbacks": self.rollbacks}
        self.history.stopped = f"rolled back {self.rollbacks} times already: {request.reason}"
        if self.history.rows:
            self._note_events(self.history.rows[-1])
            self._checkpoints.save(lambda: checkpoint(self, train), self.model)
        else:
            raise RuntimeError(f"the first epoch was {self.history.stopped}")

    def _note_events(self, row: dict) -> None:
        if self._events:
            row["events"], self._events = [*row.get("events", []), *self._events], []

    def _keep(self, row: dict, request: Stop | None, train: Iterable) -> None:
        """Keep an epoch's row and its state; note it if it is the best.

        The best epoch has the highest robust accuracy on validation images, or clean accuracy where none is attacked.
        """
        self._note_events(row)
        attacked = self.method.attack is not None and "val_robust_accuracy" in row
        key = "val_robust_accuracy" if attacked else "val_clean_accuracy"
        best = max((r[key] for r in self.history.rows if key in r), default=-1.0)
        self.history.rows.append(row)
        if row.get(key, -1.0) > best:
            self.history.best_epoch = row["epoch"]
        if request is not None:
            self.history.stopped = request.reason
        self._checkpoints.save(lambda: checkpoint(self, train), self.model)
