"""Clean accuracy and attacks over globally numbered batches: resumable, and shared by any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from at_extensions.checks import check_labels, check_logits
from at_extensions.evaluation.flags import Flag, Predict, Warnings
from at_extensions.evaluation.samples import Samples
from at_extensions.evaluation.state import Batch, Store
from at_extensions.evaluation.suite import CROSS_ENTROPY, GRADIENT_FREE, aimed
from at_extensions.evaluation.verification import fooled, margin
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


@dataclass(frozen=True, eq=False)
class Plan:
    """One evaluation of a model by a suite of attacks.

    Attributes:
        model: The model, which identifies a stored state; in the mode in which it is evaluated.
        predict: Images (B, C, H, W) -> logits (B, K) of the model.
        samples: The evaluated samples.
        attackers: AutoAttack's attack objects, with their settings (``suite.Attackers``).
        attacks: Names of the attacks, in the order they run.
        norm: Threat model.
        eps: Its radius.
        version: AutoAttack's version; decides which checks apply.
        seed: Seed of the first batch.
        seed_step: Batch b of an attack draws from ``seed + b * seed_step``.
        batch_size: Samples a batch.
        device: Where the model is.
        strict: Raise for attacks that are undefined for so few classes, instead of leaving them out with a flag.
        search: First images -> the model that attacks search on; None searches on the model itself.
        precision: Of the search.
        masking: Whether to run the short attacks of ``masking`` too.
        class_counts: Training samples of each class (K,), to be checked before any attack runs; None if unknown.
        store: Where finished batches are kept.
        identity: Further settings that a stored state is tied to, as JSON.
        ranks: The processes that share the work.
        keep: How many adversarial examples to return; all if None.
        listener: Is told about the progress.
    """

    model: Any
    predict: Predict
    samples: Samples
    attackers: Any
    attacks: Sequence[str]
    norm: str
    eps: float
    version: str
    seed: int
    seed_step: int
    batch_size: int
    device: torch.device
    strict: bool = False
    search: Callable[[Tensor], Predict] | None = None
    precision: str = "fp32"
    masking: bool = False
    class_counts: Sequence[int] | None = None
    store: Store = field(default_factory=lambda: Store(None))
    identity: Mapping[str, Any] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)
    keep: int | None = None
    listener: Listener = field(default_factory=Listener)

    def seed_of(self, number: int) -> int:
        """Return the seed of the batch with this number."""
        return self.seed + number * self.seed_step


def clean_pass(plan: Plan) -> Clean:
    """Classify every unperturbed sample; each process takes its share of the batches.

    Raises:
        ValueError: Logits that are not (B, K) or not finite, labels out of range.
    """
    samples, ranks = plan.samples, plan.ranks
    chunks = torch.arange(len(samples)).split(plan.batch_size)

    def work() -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, bytes], int | None, float]:
        start, answers, num_classes = time.perf_counter(), {}, None
        for number in range(ranks.rank, len(chunks), ranks.world):
            x, y = samples.read(chunks[number])
            logits = check_logits(plan.predict(x.to(plan.device)), len(x), num_classes)
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


class BatchedAttacks:
    """Runs attack objects one after the other, each on the samples that are robust against those before it.

    Before each attack the robust samples are cut into numbered batches. A batch is a function of its samples and its
    seed alone, so that finished batches can be stored, and the others dealt to any number of processes.

    Args:
        plan: The evaluation.
        suite: Attack objects by name, in the order they run.
        search: The model that attacks search on; every adversarial example is verified by ``plan.predict``.
    """

    def __init__(self, plan: Plan, suite: Mapping[str, Any], search: Predict):
        self.plan, self.suite, self.search = plan, suite, search

    def run(self, clean: Clean) -> Verdicts:
        """Run every attack and return the verdicts."""
        verdicts = Verdicts(clean.correct.clone(), clean.predictions.clone())
        for attack in self.suite:
            kept = None if self.plan.keep is None else self.plan.keep - len(verdicts.adversarial)
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
            self.plan.listener.ended(attack, verdicts)
        return verdicts

    def _run_attack(self, attack: str, rows: Tensor, keep: int | None) -> list[Batch]:
        chunks = [] if len(rows) == 0 else list(rows.split(self.plan.batch_size))
        batches: dict[int, Batch] = {}
        for theirs in self.plan.ranks.together(lambda: self._stored(attack, chunks, keep)):  # a folder a node
            batches.update(theirs)
        pending = [number for number in range(len(chunks)) if number not in batches]
        share = pending[self.plan.ranks.rank :: self.plan.ranks.world]
        self.plan.listener.started(attack, len(share), len(batches))

        def work() -> dict[int, Batch]:
            mine = {}
            for number in share:
                before = sum(len(b.adversarial) for b in (batches | mine).values() if b.number < number)
                batch = self._attack_batch(attack, number, chunks[number])
                batch = batch.keep(None if keep is None else max(0, keep - before))
                self.plan.store.save(attack, batch)
                mine[number] = batch
                self.plan.listener.finished_batch(attack, batch)
            return mine

        for theirs in self.plan.ranks.together(work):
            batches.update(theirs)
        return _first_examples([batches[number] for number in range(len(chunks))], keep)

    def _stored(self, attack: str, chunks: list[Tensor], keep: int | None) -> dict[int, Batch]:
        found = (self.plan.store.load(attack, number, rows) for number, rows in enumerate(chunks))
        batches = _first_examples([batch for batch in found if batch is not None], keep)
        return {batch.number: batch for batch in batches}

    def _attack_batch(self, attack: str, number: int, rows: Tensor) -> Batch:
        start, warnings = time.perf_counter(), Warnings()
        x, y = (tensor.to(self.plan.device) for tensor in self.plan.samples.read(rows))
        torch.manual_seed(self.plan.seed_of(number))  # for models that draw random numbers themselves
        x_adv = self._perturb(attack, self.search, number, x, y, warnings)
        broken, predictions = fooled(self.plan.predict, x, y, x_adv, self.plan.norm, self.plan.eps)
        again = self._incomplete(attack, x, y, x_adv, broken)
        if again.any():
            x_adv[again] = self._perturb(attack, self.plan.predict, number, x[again], y[again], warnings)
            broken[again], predictions[again] = fooled(
                self.plan.predict, x[again], y[again], x_adv[again], self.plan.norm, self.plan.eps
            )
        return Batch(
            number=number,
            rows=rows,
            broken=broken.cpu(),
            predictions=torch.where(broken, predictions, y).cpu(),  # robust images were and are classified correctly
            adversarial=x_adv[broken].cpu(),
            seconds=time.perf_counter() - start,
            zero_gradients=warnings.zero_gradients,
            contradicted=int((self.plan.predict(x).argmax(1) != y).sum()),
        )

    def _incomplete(self, attack: str, x: Tensor, y: Tensor, x_adv: Tensor, broken: Tensor) -> Tensor:
        """Which images have to be attacked on the model itself (B,), because the search model decided about them.

        These are the images that the search model alone misclassifies, perturbed or not. In low precision they are also
        those whose gradient vanishes and, for cross-entropy, those whose logits are off by more than 1.
        """
        if self.search is self.plan.predict:
            return torch.zeros_like(broken)
        logits = self.search(x)
        again = (x_adv != x).flatten(1).any(1) | (logits.argmax(1) != y)
        if self.plan.precision != "fp32" and attack not in GRADIENT_FREE:
            loss = margin if attack not in CROSS_ENTROPY else partial(cross_entropy, reduction="none")
            again |= _vanishing_gradients(self.search, x, y, loss)
            if attack in CROSS_ENTROPY:
                again |= (logits - self.plan.predict(x)).abs().amax(1) > 1
        return again & ~broken

    def _perturb(self, attack: str, predict: Predict, number: int, x: Tensor, y: Tensor, warnings: Warnings) -> Tensor:
        seed = self.plan.seed_of(number)
        attacker = aimed(self.suite[attack], predict, seed=seed, device=self.plan.device, logger=warnings)
        return attacker.perturb(x.clone(), y.clone()).detach()


def _vanishing_gradients(model: Predict, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Whether the input gradient of a loss of logits (B, K) and classes (B,) is zero at each image (B,)."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(x), y).sum(), x)
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
