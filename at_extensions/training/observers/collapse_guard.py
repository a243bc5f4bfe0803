"""A guard against catastrophic overfitting, which sees the collapse within the epoch and goes on after it."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack
from tqdm import tqdm

from at_extensions import processes
from at_extensions.attacks import PGD, norm_of, radius_of
from at_extensions.checks import check_count, check_images, check_labels, check_name, check_number, device_of
from at_extensions.folding import count_steps
from at_extensions.methods import Method, Step
from at_extensions.training.observers.collapse_verdict import Verdict, count_right, first_images
from at_extensions.training.observers.observer import Observer, RollBack, Stop, Training
from at_extensions.training.observers.remedies import REMEDIES, check_treatable, escalated

ACTIONS = ("warn", "stop", "rollback")
"""Answers to a collapse."""

_SKILL = 0.1  # of the way from guessing to certainty, below which equal accuracies are no alarm
_LONGEST_PAUSE = 8  # windows without a confirmation, after alarms that were none


class CollapseGuard(Observer):
    """Catches catastrophic overfitting within the epoch and warns, stops, or rolls back and goes on with a remedy.

    In catastrophic overfitting (Wong et al. 2020; arXiv 2206.08242) a single-step attack stops finding adversarial
    examples: accuracy under it exceeds clean accuracy while accuracy under PGD falls to 0, within a few hundred steps.

    - **Sentinel**, for single-step methods: accuracy on the training batches at the attack's start and at its end,
      which training computes anyway. The counts stay on the device and are read every ``window`` steps; an accuracy at
      the end that is not below the one at the start, and is better than guessing, is an alarm.
    - **Confirmation**: the training attack and PGD-10 on fixed held-out images, in eval mode and without compiled code.
      Collapsed is a model whose accuracy under one step exceeds the one under PGD by more than ``gap``, or whose
      accuracy under PGD fell below ``fall`` times its best so far, by more than two standard errors. An alarm that is
      not confirmed is recorded; after each in a row the guard pauses twice as long, for up to 8 windows.
    - **Epoch's end**, before the epoch is kept: a confirmation follows an alarm of the last steps, a robust accuracy on
      the validation batches below ``fall`` times its best, and a gap between training and validation under attack above
      ``gap`` that has grown by 0.1 since the epoch before. So an epoch that is kept ends in a state that showed no
      collapse, and a rollback to an epoch's beginning is one to a good state. Without sentinel (``sentinel=False``, an
      attack of several steps), or without validation under attack, it runs at each epoch's end.

    Action ``"rollback"`` goes back to the newest snapshot that is at least ``back`` steps old, never before the epoch's
    beginning, and applies the remedy; the best robust accuracy is counted anew from there. A second collapse under
    ``"n_fgsm"`` or ``"grad_align"`` is answered by ``"more_steps"``. A resumed run applies the remedies of the
    interrupted one again. Every event and its evidence is in the row's ``events``: ``rollback``, ``stop``, ``warning``,
    and ``alarm`` for one that was not confirmed.

    Cost without alarm: two comparisons of logits with labels a step, and one reading of the device a window; with
    ``"rollback"`` a copy of the run's state a window, of which four are in memory. A confirmation costs 26 passes of
    each held-out image, 512 of them 13,300 passes, against 250,000 in an epoch of FGSM training on 50,000 images.

    In a loop of your own, call ``watch(method, step, y)`` after each step, and ``check(model)`` every ``window``
    steps: it returns a request, whose ``reason`` and ``evidence`` are the finding, or None. ``guard.verdict`` is the
    last confirmation's.

    Args:
        held_out_images: (n, C, H, W), not trained on; of more than ``images`` the first ones are used. None takes them
            from the trainer's validation batches. Give every process the same: they share the work.
        held_out_labels: Class numbers (n,).
        action: ``"warn"``, ``"stop"`` or ``"rollback"``.
        remedy: After a rollback: ``"n_fgsm"`` (``attacks.NFGSM`` with the same eps), ``"grad_align"``
            (``methods.GradAlign`` around the method), ``"more_steps"`` (PGD of twice as many steps), ``"lower_alpha"``
            (half the step size), or a function of the trainer, as in ``RollBack``.
        sentinel: Whether to watch training accuracy.
        window: Steps between two readings, and between two snapshots.
        back: Steps to go back at least; None goes back two windows.
        images: Largest number of held-out images.
        attack: Makes the attack of the confirmation from a model; None means PGD-10 in Linf with steps of eps / 4 at
            the training attack's eps.
        gap: Difference of accuracies that is a collapse, in (0, 1).
        fall: Share of the best robust accuracy below which it is a collapse, in (0, 1).
        seed: Of the attacks' random starts, the same ones at every confirmation.

    Attributes:
        verdict: Of the last confirmation; None before.
        applied: Names of the remedies applied so far; a function's is its ``__name__``.

    Raises:
        TypeError, ValueError: Images, labels or numbers that cannot be right, an unknown action or remedy; in training,
            a trainer without validation data where none are given, or a method whose attack has no eps in Linf.
    """

    snapshots = 3

    def __init__(
        self,
        held_out_images: Tensor | None = None,
        held_out_labels: Tensor | None = None,
        *,
        action: str = "warn",
        remedy: str | Callable[[Training], None] = "n_fgsm",
        sentinel: bool = True,
        window: int = 50,
        back: int | None = None,
        images: int = 512,
        attack: Callable[[nn.Module], Attack] | None = None,
        gap: float = 0.3,
        fall: float = 0.5,
        seed: int = 0,
    ):
        self.action = check_name("action", action, ACTIONS)
        self.remedy = remedy if callable(remedy) else check_name("remedy", remedy, REMEDIES)
        self.window, self.images = check_count("window", window), check_count("images", images)
        self.back = 2 * window if back is None else check_count("back", back, at_least=0)
        self.gap = check_number("gap", gap, above=0, below=1)
        self.fall = check_number("fall", fall, above=0, below=1)
        self.sentinel, self.attack, self.seed = sentinel, attack, seed
        self.rolls_back = action == "rollback"
        self.check_every = self.snapshot_every = self.window
        self.verdict: Verdict | None = None
        self.applied: list[str] = []
        self._given = held_out_images is not None
        self._held_out: tuple[Tensor, Tensor] | None = None  # this process's share
        if (held_out_images is None) != (held_out_labels is None):
            raise ValueError("give held_out_images and held_out_labels together, or neither")
        if held_out_images is not None:
            check_images(held_out_images, values=False)
            check_labels(held_out_labels, size=len(held_out_images))
            self._held_out = held_out_images[: self.images], held_out_labels[: self.images].long()
        self._trainer: Training | None = None
        self._method: Method | None = None
        self._counts: Tensor | None = None  # right at the start, right at the end, images
        self._steps, self._classes = 0, 2  # steps in this window, classes of the logits
        self._best, self._best_validated, self._last_gap = 0.0, 0.0, 0.0
        self._pause, self._paused = 1, 0  # windows: of the next pause, left of this one
        self._reported = False
        self._epoch, self._number, self._pending = 1, 0, []

    def begin(self, trainer: Training) -> None:
        """Take held-out images from the trainer's validation batches where none were given.

        Raises:
            ValueError: There are none, or the method's attack does not fit.
        """
        self._trainer, self._method = trainer, trainer.method
        _check_attacked(trainer.method, self.attack)
        if self.action == "rollback":
            check_treatable(trainer, self.remedy)
        self._epoch = len(trainer.history.rows) + 1
        if self._watches:
            trainer.method.keep_first_pass = True
        if not self._given:
            if trainer.val is None:
                raise ValueError(
                    "CollapseGuard needs held-out images: train with validation batches (val_fraction > 0), or give "
                    "it held_out_images and held_out_labels"
                )
            self._held_out = first_images(trainer.val, math.ceil(self.images / processes.world_size()))

    @property
    def _watches(self) -> bool:
        """Whether the sentinel watches the present method."""
        return self.sentinel and self._method is not None and count_steps(self._method.attack) == 1

    def after_step(self, number: int, step: Step, y: Tensor) -> None:
        """Count a step of the trainer's method."""
        self._number = number
        self.watch(self._trainer.method, step, y)

    @torch.no_grad()
    def watch(self, method: Method, step: Step, y: Tensor) -> None:
        """Count training accuracy at the attack's start and end, on the device.

        Args:
            method: The method that made the step.
            step: Its result.
            y: Class numbers (B,).
        """
        self._method = method
        if not self._watches:
            return
        method.keep_first_pass = True  # a method's first step in a loop of its own goes unseen
        first = method.first_pass
        if first is None or first.logits is None or len(first.logits) != len(y):
            return
        self._classes = step.logits.shape[1]
        start, end = (logits.detach().argmax(1) == y for logits in (first.logits, step.logits))
        counts = torch.stack([start.sum(), end.sum(), torch.full_like(start.sum(), len(y))])
        self._counts = counts if self._counts is None else self._counts + counts
        self._steps += 1

    def check(self, model: nn.Module) -> Stop | RollBack | None:
        """Confirm an alarm of the last window's steps; in a loop of your own without sentinel, at every call.

        Args:
            model: The model; in a trainer, the one being trained is attacked instead (with EMA, not the average).

        Returns:
            The request of the action, whose evidence holds the finding; None without a collapse. After a warning,
            which is one a collapse, None as well.
        """
        alone = self._trainer is None
        accuracies = self._read()
        if accuracies is None:
            return self._confirm(model, {}) if alone else None
        if not self._alarming(accuracies):
            self._pause, self._paused = 1, 0
            return None
        if self._paused > 0:
            self._paused -= 1
            return None
        return self._confirm(model if alone else self._trainer.method.model, accuracies)

    def after_epoch(self, epoch: int, model: nn.Module, row: dict[str, Any]) -> dict[str, Any] | Stop | RollBack | None:
        """Confirm what the epoch's last steps and its row make suspicious, and hand over the events."""
        self._epoch = epoch
        accuracies = self._read() if self._steps >= self.window / 4 else self._forget()
        validated, suspicious = row.get("val_robust_accuracy"), False
        if validated is None or not self._watches:
            suspicious = True
        else:
            gap = row["train_accuracy"] - validated
            suspicious = validated < self.fall * self._best_validated
            suspicious |= gap > self.gap and gap > self._last_gap + 0.1
        if self._alarming(accuracies):
            suspicious = True
        request = self._confirm(self._trainer.method.model, accuracies or {}) if suspicious else None
        if isinstance(request, RollBack):
            return request
        if validated is not None:
            self._best_validated = max(self._best_validated, validated)
            self._last_gap = row["train_accuracy"] - validated
            if self._trainer.ema is None and not self._given:
                self._best = max(self._best, validated)
        self._reported = self._reported and suspicious
        self._epoch += 1
        events, self._pending = self._pending, []
        if isinstance(request, Stop):
            return dataclasses.replace(request, evidence=request.evidence | ({"before": events} if events else {}))
        return {"events": [*row.get("events", []), *events]} if events else None

    def _read(self) -> dict[str, float] | None:
        """Read the counts over all processes and begin a new window; None if no step was seen."""
        counts = torch.zeros(3, dtype=torch.long) if self._counts is None else self._counts
        if processes.world_size() > 1:
            counts = processes.add_over_ranks(counts.to(self._device()))
        start, end, images = counts.tolist()
        self._forget()
        return {"start_accuracy": start / images, "end_accuracy": end / images} if images else None

    def _alarming(self, accuracies: dict[str, float] | None) -> bool:
        """Whether training saw no adversarial examples; a network that still guesses loses nothing under attack."""
        if not accuracies:
            return False
        guessing = 1 / self._classes
        skilled = accuracies["end_accuracy"] > guessing + _SKILL * (1 - guessing)
        return skilled and accuracies["end_accuracy"] >= accuracies["start_accuracy"]

    def _device(self) -> torch.device:
        return device_of(self._method.model)

    def _forget(self) -> None:
        self._counts, self._steps = None, 0

    def _confirm(self, model: nn.Module, accuracies: dict[str, float]) -> Stop | RollBack | None:
        """Attack the held-out images, and return the action's request if the model has collapsed."""
        if self._reported and self._watches:
            return None
        self.verdict = verdict = self._judge(model)
        evidence = accuracies | verdict.to_dict()
        if not verdict.collapsed:
            self._reported = False
            self._paused, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
            if self._alarming(accuracies):
                self._note("alarm", verdict.reason, evidence)
            return None
        self._pause, self._paused = 1, 0
        if self._reported:
            return None
        self._reported = not self.rolls_back
        if self.action == "warn":
            self._note("warning", verdict.reason, evidence)
            if processes.is_main():
                warnings.warn(f"{verdict.reason}. {ADVICE}", stacklevel=2)
            return None
        name = self._name()
        self._say(f"{verdict.reason}; " + (f"rolling back, remedy {name}" if self.rolls_back else "stopping"))
        if self.action == "stop":
            return Stop(verdict.reason, evidence)
        return RollBack(verdict.reason, self.back, self._treat, evidence | {"remedy": name})

    def _note(self, kind: str, reason: str, evidence: dict[str, Any]) -> None:
        event = {"event": kind, "observer": type(self).__name__, "epoch": self._epoch, "step": self._number}
        self._pending.append(event | {"reason": reason} | evidence)

    def _say(self, text: str) -> None:
        if processes.is_main() and getattr(self._trainer, "progress", False):
            tqdm.write(f"epoch {self._epoch}: {text}", file=sys.stderr)

    def _name(self) -> str:
        if isinstance(self.remedy, str):
            return escalated(self.remedy, self._method)
        return getattr(self.remedy, "__name__", "a function")

    def _treat(self, trainer: Training) -> None:
        """Apply the remedy."""
        name = self._name()
        (REMEDIES[name] if isinstance(self.remedy, str) else self.remedy)(trainer)
        self.applied.append(name)
        self._method = trainer.method
        self._best, self._best_validated = 0.0, 0.0  # the state gone back to may have fallen below them already
        self._forget()
        if self._watches:
            trainer.method.keep_first_pass = True

    def _judge(self, model: nn.Module) -> Verdict:
        """Attack the held-out images and compare."""
        if self._held_out is None:
            raise ValueError("CollapseGuard needs held_out_images and held_out_labels in a loop of your own")
        share = slice(processes.rank(), None, processes.world_size()) if self._given else slice(None)
        images, labels = (tensor[share] for tensor in self._held_out)
        (clean, one, pgd), n = count_right(model, self._attacks(model), images, labels, self.seed)
        best = max(self._best, pgd)
        noise = 2 * math.sqrt((pgd * (1 - pgd) + best * (1 - best)) / n)
        fell = pgd < self.fall * best and best - pgd > noise
        self._best = best
        return Verdict(one - pgd > self.gap or fell, clean, one, pgd, best, n)

    def _attacks(self, model: nn.Module) -> tuple[Attack, Attack]:
        """Return the single-step attack and the strong one."""
        if self._method is None:
            raise ValueError(
                "call watch(method, step, y) after a step before check(model): it tells the guard the attack"
            )
        attack = self._method.attack
        _check_attacked(self._method, self.attack)
        eps, limits = radius_of(attack), {"image_range": self._method.image_range}
        strong = PGD(model, eps, eps / 4, 10, **limits) if self.attack is None else self.attack(model)
        one_step = attack if count_steps(attack) == 1 else PGD(model, eps, eps, 1, start="zero", **limits)
        return one_step, strong

    def state_dict(self) -> dict[str, Any]:
        """Return counts, bests, pauses, pending events and the remedies applied."""
        return {
            "counts": None if self._counts is None else self._counts.clone(),
            "steps": self._steps,
            "best": self._best,
            "best_validated": self._best_validated,
            "last_gap": self._last_gap,
            "pauses": [self._pause, self._paused],
            "reported": self._reported,
            "epoch": self._epoch,
            "pending": list(self._pending),
            "applied": list(self.applied),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with another guard's memory, and apply the remedies that it applied and this one has not."""
        for _ in range(len(state["applied"]) - len(self.applied)):
            self._treat(self._trainer)
        self._counts, self._steps = state["counts"], state["steps"]
        if self._counts is not None and self._method is not None:
            self._counts = self._counts.to(self._device())
        self._best, self._best_validated, self._last_gap = state["best"], state["best_validated"], state["last_gap"]
        self._pause, self._paused = state["pauses"]
        self._reported, self._epoch, self._pending = state["reported"], state["epoch"], list(state["pending"])


ADVICE = (
    "Go on from an earlier checkpoint with method n_fgsm or grad_align, more attack steps or a smaller alpha; "
    'CollapseGuard(action="rollback") does so by itself.'
)


def _check_attacked(method: Method, attack: Callable | None) -> None:
    """Refuse a method that the guard cannot attack.

    Raises:
        ValueError: It has no attack, or one without an eps in Linf where none was given.
    """
    if method.attack is None:
        raise ValueError("CollapseGuard watches adversarial training; this method has no attack")
    several = count_steps(method.attack) != 1
    if (norm_of(method.attack) != "Linf" or radius_of(method.attack) is None) and (attack is None or several):
        raise ValueError(
            f"the training attack {method.attack.attack} has no eps in Linf; give a single-step method and "
            "CollapseGuard(attack=), which makes the attack that confirms an alarm"
        )
