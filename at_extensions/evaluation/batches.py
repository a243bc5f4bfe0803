"""Clean accuracy and attacks over globally numbered batches: resumable, and shared by any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from at_extensions.checks import check_labels, check_logits
from at_extensions.evaluation.flags import Flag, Predict, Warnings
from at_extensions.evaluation.samples import Samples
from at_extensions.evaluation.state import Batch, Store
from at_extensions.evaluation.suite import GRADIENT_FREE, aimed
from at_extensions.evaluation.verification import fooled
from at_extensions.processes import Ranks


@dataclass(eq=False)
class Clean:
    """The model's predictions for the unperturbed samples.

    Attributes:
        labels: (N,).
        predictions: (N,).
        num_classes: K.
        seconds: Time it took, summed over the processes.
    """

    labels: Tensor
    predictions: Tensor
    num_classes: int
    seconds: float

    @property
    def correct(self) -> Tensor:
        """Which samples are classified correctly (N,)."""
        return self.predictions == self.labels


@dataclass(eq=False)
class Verdicts:
    """Which samples are robust against every attack so far.

    Attributes:
        robust: Samples without an adversarial example (N,).
        predictions: Classes predicted for the adversarial examples, where there are some, or for the images (N,).
        after_attack: Attack -> robust accuracy after it, in order.
        seconds: Attack -> time it took, summed over its batches.
        zero_gradients: Samples at which an attack met a gradient of zero; the largest count of any attack.
        contradicted: Robust samples that the model misclassified when evaluated again; the largest count of any attack.
        adversarial: (row, adversarial image) of the first samples that were fooled, or of all.
    """

    robust: Tensor
    predictions: Tensor
    after_attack: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    zero_gradients: int = 0
    contradicted: int = 0
    adversarial: list[tuple[int, Tensor]] = field(default_factory=list)


class Listener:
    """Is told about the progress of an evaluation; every method of this class does nothing."""

    def classified(self, clean: Clean) -> None:
        """The clean pass is over on every process."""

    def flagged(self, flags: Sequence[Flag]) -> None:
        """Checks raised these flags; called before the attacks and after them."""

    def started(self, attack: str, share: int, done: int) -> None:
        """``attack`` starts: ``share`` batches for this process, ``done`` batches finished in an earlier run."""

    def finished_batch(self, attack: str, batch: Batch) -> None:
        """This process has finished a batch."""

    def ended(self, attack: str, verdicts: Verdicts) -> None:
        """``attack`` is over on every process."""


def clean_pass(model: Predict, samples: Samples, batch_size: int, device: torch.device, ranks: Ranks) -> Clean:
    """Classify every unperturbed sample; each process takes its share of the batches.

    Raises:
        ValueError: Logits that are not (B, K) or not finite, labels out of range.
    """
    chunks = torch.arange(len(samples)).split(batch_size)

    def work() -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, bytes], int | None, float]:
        start, answers, num_classes = time.perf_counter(), {}, None
        for number in range(ranks.rank, len(chunks), ranks.world):
            x, y = samples.read(chunks[number])
            logits = check_logits(model(x.to(device)), len(x), num_classes)
            num_classes = logits.shape[1]
            check_labels(y, num_classes)
            if not torch.isfinite(logits).all():
                raise ValueError("the model returns logits that are not finite; is it trained, and in float32?")
            answers[number] = y.cpu(), logits.argmax(1).cpu()
        return answers, samples.fingerprints, num_classes, time.perf_counter() - start

    answers, num_classes, seconds = {}, None, 0.0
    for theirs, fingerprints, classes, spent in ranks.together(work):
        answers.update(theirs)
        samples.fingerprints.update(fingerprints)
        num_classes = classes or num_classes
        seconds += spent
    labels, predictions = (torch.cat([answers[n][i] for n in range(len(chunks))]) for i in (0, 1))
    return Clean(labels, predictions, num_classes, seconds)


@dataclass(frozen=True, eq=False)
class BatchedAttacks:
    """Runs attack objects one after the other, each on the samples that are robust against those before it.

    Before each attack the robust samples are cut into numbered batches. A batch is a function of its samples and its
    seed alone, so that finished batches can be stored, and the others dealt to any number of processes.

    Attributes:
        model: The model as given; it alone decides what counts.
        search: The model that attacks search on; may be ``model`` itself.
        samples: The attacked samples.
        suite: Attack objects by name, in the order they run.
        norm: Threat model.
        eps: Its radius.
        seed_of: Number of a batch -> its seed.
        batch_size: Samples a batch.
        device: Where the model is.
        low_precision: Whether ``search`` computes in less than float32.
        store: Where finished batches are kept.
        ranks: The processes that share the work.
        keep: How many adversarial examples to return; all if None.
        listener: Is told about the progress.
    """

    model: Predict
    search: Predict
    samples: Samples
    suite: Mapping[str, Any]
    norm: str
    eps: float
    seed_of: Callable[[int], int]
    batch_size: int
    device: torch.device
    low_precision: bool
    store: Store
    ranks: Ranks
    keep: int | None
    listener: Listener

    def run(self, clean: Clean) -> Verdicts:
        """Run every attack and return the verdicts."""
        verdicts = Verdicts(clean.correct.clone(), clean.predictions.clone())
        for attack in self.suite:
            kept = None if self.keep is None else self.keep - len(verdicts.adversarial)
            batches = self._run_attack(attack, verdicts.robust.nonzero().flatten(), kept)
            for batch in batches:
                broken = batch.rows[batch.broken]
                verdicts.robust[broken] = False
                verdicts.predictions[broken] = batch.predictions[batch.broken]
                verdicts.adversarial += zip(broken.tolist(), batch.adversarial)
            verdicts.after_attack[attack] = verdicts.robust.double().mean().item()
            verdicts.seconds[attack] = sum(batch.seconds for batch in batches)
            for count in ("zero_gradients", "contradicted"):
                worst = max(getattr(verdicts, count), sum(getattr(batch, count) for batch in batches))
                setattr(verdicts, count, worst)
            self.listener.ended(attack, verdicts)
        return verdicts

    def _run_attack(self, attack: str, rows: Tensor, keep: int | None) -> list[Batch]:
        chunks = [] if len(rows) == 0 else list(rows.split(self.batch_size))
        batches: dict[int, Batch] = {}
        for theirs in self.ranks.together(lambda: self._stored(attack, chunks, keep)):  # each node may have a folder
            batches.update(theirs)
        pending = [number for number in range(len(chunks)) if number not in batches]
        share = pending[self.ranks.rank :: self.ranks.world]
        self.listener.started(attack, len(share), len(batches))

        def work() -> dict[int, Batch]:
            mine = {}
            for number in share:
                before = sum(len(b.adversarial) for b in (batches | mine).values() if b.number < number)
                batch = self._attack_batch(attack, number, chunks[number])
                batch = batch.keep(None if keep is None else max(0, keep - before))
                self.store.save(attack, batch)
                mine[number] = batch
                self.listener.finished_batch(attack, batch)
            return mine

        for theirs in self.ranks.together(work):
            batches.update(theirs)
        return _first_examples([batches[number] for number in range(len(chunks))], keep)

    def _stored(self, attack: str, chunks: list[Tensor], keep: int | None) -> dict[int, Batch]:
        found = (self.store.load(attack, number, rows) for number, rows in enumerate(chunks))
        batches = _first_examples([batch for batch in found if batch is not None], keep)
        return {batch.number: batch for batch in batches}

    def _attack_batch(self, attack: str, number: int, rows: Tensor) -> Batch:
        start, warnings = time.perf_counter(), Warnings()
        x, y = (tensor.to(self.device) for tensor in self.samples.read(rows))
        torch.manual_seed(self.seed_of(number))  # for models that draw random numbers themselves
        x_adv = self._perturb(attack, self.search, number, x, y, warnings)
        broken, predictions = fooled(self.model, x, y, x_adv, self.norm, self.eps)
        again = self._incomplete(attack, x, y, x_adv, broken)
        if again.any():
            x_adv[again] = self._perturb(attack, self.model, number, x[again], y[again], warnings)
            broken[again], predictions[again] = fooled(
                self.model, x[again], y[again], x_adv[again], self.norm, self.eps
            )
        return Batch(
            number=number,
            rows=rows,
            broken=broken.cpu(),
            predictions=torch.where(broken, predictions, y).cpu(),  # robust images were and are classified correctly
            adversarial=x_adv[broken].cpu(),
            seconds=time.perf_counter() - start,
            zero_gradients=warnings.zero_gradients,
            contradicted=int((self.model(x).argmax(1) != y).sum()),
        )

    def _incomplete(self, attack: str, x: Tensor, y: Tensor, x_adv: Tensor, broken: Tensor) -> Tensor:
        """Which images have to be attacked on the model itself (B,), because the search model decided about them.

        These are the images that the search model alone misclassifies, perturbed or not, and those whose gradient
        vanishes in low precision but not in float32.
        """
        if self.search is self.model:
            return torch.zeros_like(broken)
        again = (x_adv != x).flatten(1).any(1) | (self.search(x).argmax(1) != y)
        if self.low_precision and attack not in GRADIENT_FREE:
            vanishes = _vanishing_gradients(self.search, x, y)
            if vanishes.any():
                again |= vanishes & ~_vanishing_gradients(self.model, x, y)
        return again & ~broken

    def _perturb(self, attack: str, predict: Predict, number: int, x: Tensor, y: Tensor, warnings: Warnings) -> Tensor:
        seed = self.seed_of(number)
        attacker = aimed(self.suite[attack], predict, seed=seed, device=self.device, logger=warnings)
        return attacker.perturb(x.clone(), y.clone()).detach()


def _vanishing_gradients(model: Predict, x: Tensor, y: Tensor) -> Tensor:
    """Whether the input gradient of cross-entropy is zero at each image (B,)."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(x), y, reduction="sum"), x)
    return (gradient == 0).flatten(1).all(1)


def _first_examples(batches: list[Batch], keep: int | None) -> list[Batch]:
    """The batches, in order, with the first ``keep`` adversarial images between them; all if None."""
    if keep is None:
        return batches
    pruned = []
    for batch in batches:
        pruned.append(batch.keep(keep))
        keep -= len(pruned[-1].adversarial)
    return pruned
