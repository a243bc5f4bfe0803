"""The sequence of an evaluation: clean pass, checks, suite of attacks, checks for masked gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from at_extensions.checks import check_class_counts
from at_extensions.evaluation import flags as checks
from at_extensions.evaluation import masking
from at_extensions.evaluation.batches import BatchedAttacks, Clean, Listener, Verdicts, clean_pass
from at_extensions.evaluation.flags import Flag, Predict
from at_extensions.evaluation.precision import arithmetic
from at_extensions.evaluation.samples import Samples
from at_extensions.evaluation.state import Store, weights_digest
from at_extensions.evaluation.suite import by_name, check_usable, defined_for, settings
from at_extensions.processes import Ranks
from at_extensions.untouched import isolated
from at_extensions.upstream import backend_version


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a run.

    Attributes:
        clean: Predictions for the unperturbed samples.
        verdicts: Which samples are robust.
        suite: The attack objects that ran, by name.
        flags: The flags that were raised.
    """

    clean: Clean
    verdicts: Verdicts
    suite: dict[str, Any]
    flags: list[Flag]


@dataclass(frozen=True, eq=False)
class SuiteRun:
    """One evaluation of a model by a suite of attacks; ``run`` leaves global random generators as they were.

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

    def run(self) -> Outcome:
        """Evaluate the model.

        Raises:
            ValueError: Labels or class counts that do not fit the model, a model that is no classifier or gives no
                gradients, undefined attacks where ``strict``, a store that belongs to another evaluation.
        """
        with isolated(self.device):
            torch.manual_seed(self.seed)  # for models that draw random numbers themselves
            clean = clean_pass(self.predict, self.samples, self.batch_size, self.device, self.ranks)
            with self.ranks.in_step():
                if self.class_counts is not None:
                    check_class_counts(self.class_counts, clean.num_classes)
                suite, flags = self._suite(clean.num_classes)
                x, y = self._first(torch.arange(len(self.samples)), self.batch_size)
                check_usable(suite, self.predict, x)
                flags += checks.inspect(self.predict, x, y, version=self.version)
                search = self.predict if self.search is None else self.search(x)
            self._claim_store(clean, suite)
            self.listener.classified(clean)
            self.listener.flagged(flags)
            verdicts = BatchedAttacks(
                model=self.predict, search=search, samples=self.samples, suite=suite, norm=self.norm, eps=self.eps,
                seed_of=lambda number: self.seed + number * self.seed_step, batch_size=self.batch_size,
                device=self.device, low_precision=self.precision != "fp32", store=self.store, ranks=self.ranks,
                keep=self.keep, listener=self.listener,
            ).run(clean)  # fmt: skip
            with self.ranks.in_step():
                masked = self._masking_flags(clean, verdicts, search)
            self.listener.flagged(masked)
        return Outcome(clean, verdicts, suite, self.ranks.gather(flags + masked)[0])

    def _suite(self, num_classes: int) -> tuple[dict[str, Any], list[Flag]]:
        """The attack objects by name, and a flag if some are left out."""
        names, few_classes = defined_for(self.attacks, num_classes)
        if few_classes is not None and self.strict:
            raise ValueError(f"with {num_classes} classes some attacks are undefined: {few_classes.message}")
        return by_name(self.attackers, names, num_classes), [] if few_classes is None else [few_classes]

    def _first(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The images and labels of the first ``count`` of the rows, on the model's device."""
        x, y = self.samples.read(rows[: min(count, self.batch_size)])
        return x.to(self.device), y.to(self.device)

    def _claim_store(self, clean: Clean, suite: dict[str, Any]) -> None:
        """Tie the store to this evaluation, and check that all processes run the same one."""
        ranks = self.ranks
        if self.store.directory is None and ranks.world == 1:
            return
        weights = weights_digest(self.model)
        if not isinstance(self.model, nn.Module):  # a function is identified by its predictions
            weights += f" {clean.predictions.tolist()}"
        identity = {
            "weights": weights,
            "data": self.samples.digest(),
            "suite": list(suite),
            "attacks": {name: settings(attack) for name, attack in suite.items()},
            "backend": backend_version(),
            "arithmetic": arithmetic(self.device),
            **{name: getattr(self, name) for name in ("norm", "eps", "seed", "seed_step", "batch_size", "precision")},
            **self.identity,
        }
        for rank, theirs in enumerate(ranks.gather(identity)):
            other = [key for key in identity if theirs[key] != identity[key]]
            if other:
                raise ValueError(f"rank {ranks.rank} and rank {rank} evaluate different things: {', '.join(other)}")
        ranks.together(lambda: self.store.claim(identity, write=ranks.rank == 0))

    def _masking_flags(self, clean: Clean, verdicts: Verdicts, search: Predict) -> list[Flag]:
        """Flags that follow from the attacks, and from two short ones that detect masked gradients."""
        found = [
            checks.zero_gradients(verdicts.zero_gradients),
            checks.square_improves(verdicts.after_attack, len(clean.labels)),
        ]
        if self.version != "rand":
            found.append(checks.nondeterministic(verdicts.contradicted, len(self.samples)))
        if self.masking:
            torch.manual_seed(self.seed)  # the same draws in a run and in a resumed one
            search = search if self.precision == "fp32" else self.predict
            correct, robust = (rows.nonzero().flatten() for rows in (clean.correct, verdicts.robust))
            unbounded = None
            if len(correct):
                x, y = self._first(correct, masking.SAMPLES)
                unbounded = masking.unbounded(self.predict, x, y, self.norm, search=search)
            found.append(unbounded)
            if len(robust) and unbounded is None:
                x, y = self._first(robust, masking.SAMPLES)
                found.append(masking.transfer(self.predict, x, y, self.norm, self.eps, search=search))
        return [flag for flag in found if flag is not None]
