"""The sequence of an evaluation: clean pass, checks, suite of attacks, checks for masked gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from at_extensions.checks import check_class_counts
from at_extensions.evaluation import flags as checks
from at_extensions.evaluation import masking
from at_extensions.evaluation.batches import BatchedAttacks, Clean, Plan, Verdicts, clean_pass
from at_extensions.evaluation.flags import Flag, Predict
from at_extensions.evaluation.precision import arithmetic
from at_extensions.evaluation.state import weights_digest
from at_extensions.evaluation.suite import by_name, check_usable, defined_for, settings
from at_extensions.untouched import isolated
from at_extensions.upstream import backend_version


class Outcome(NamedTuple):
    """Predictions for the clean samples, verdicts, the attack objects that ran by name, and the flags raised."""

    clean: Clean
    verdicts: Verdicts
    suite: dict[str, Any]
    flags: list[Flag]


def run_suite(plan: Plan) -> Outcome:
    """Evaluate a model by a suite of attacks; global random generators come back as they were.

    Raises:
        ValueError: Labels or class counts that do not fit the model, a model that is no classifier or gives no
            gradients, undefined attacks where ``strict``, a store that belongs to another evaluation.
    """
    with isolated(plan.device):
        torch.manual_seed(plan.seed)  # for models that draw random numbers themselves
        clean = clean_pass(plan)
        with plan.ranks.in_step():
            if plan.class_counts is not None:
                check_class_counts(plan.class_counts, clean.num_classes)
            suite, flags = _suite(plan, clean.num_classes)
            x, y = _first(plan, torch.arange(len(plan.samples)), plan.batch_size)
            check_usable(suite, plan.predict, x)
            flags += checks.inspect(plan.predict, x, y, version=plan.version)
            search = plan.predict if plan.search is None else plan.search(x)
        _claim_store(plan, clean, suite)
        plan.listener.classified(clean)
        plan.listener.flagged(flags)
        verdicts = BatchedAttacks(plan, suite, search).run(clean)
        with plan.ranks.in_step():
            masked = _masking_flags(plan, clean, verdicts, search)
        plan.listener.flagged(masked)
    return Outcome(clean, verdicts, suite, plan.ranks.gather(flags + masked)[0])


def _suite(plan: Plan, num_classes: int) -> tuple[dict[str, Any], list[Flag]]:
    """The attack objects by name, and a flag if some are left out."""
    names, few_classes = defined_for(plan.attacks, num_classes)
    if few_classes is not None and plan.strict:
        raise ValueError(f"with {num_classes} classes some attacks are undefined: {few_classes.message}")
    return by_name(plan.attackers, names, num_classes), [] if few_classes is None else [few_classes]


def _first(plan: Plan, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The images and labels of the first ``count`` of the rows, on the model's device."""
    x, y = plan.samples.read(rows[: min(count, plan.batch_size)])
    return x.to(plan.device), y.to(plan.device)


def _claim_store(plan: Plan, clean: Clean, suite: dict[str, Any]) -> None:
    """Tie the store to this evaluation, and check that all processes run the same one."""
    ranks = plan.ranks
    if plan.store.directory is None and ranks.world == 1:
        return
    weights = weights_digest(plan.model)
    if not isinstance(plan.model, nn.Module):  # a function is identified by its predictions
        weights += f" {clean.predictions.tolist()}"
    identity = {
        "weights": weights,
        "data": plan.samples.digest(),
        "suite": list(suite),
        "attacks": {name: settings(attack) for name, attack in suite.items()},
        "backend": backend_version(),
        "arithmetic": arithmetic(plan.device),
        **{name: getattr(plan, name) for name in ("norm", "eps", "seed", "seed_step", "batch_size", "precision")},
        **plan.identity,
    }
    for rank, theirs in enumerate(ranks.gather(identity)):
        other = [key for key in identity if theirs[key] != identity[key]]
        if other:
            raise ValueError(f"rank {ranks.rank} and rank {rank} evaluate different things: {', '.join(other)}")
    ranks.together(lambda: plan.store.claim(identity, write=ranks.rank == 0))


def _masking_flags(plan: Plan, clean: Clean, verdicts: Verdicts, search: Predict) -> list[Flag]:
    """Flags that follow from the attacks, and from two short ones that detect masked gradients."""
    found = [
        checks.zero_gradients(verdicts.zero_gradients),
        checks.square_improves(verdicts.after_attack, len(clean.labels)),
    ]
    if plan.version != "rand":
        found.append(checks.nondeterministic(verdicts.contradicted, len(plan.samples)))
    if plan.masking:
        torch.manual_seed(plan.seed)  # the same draws in a run and in a resumed one
        search = search if plan.precision == "fp32" else plan.predict
        correct, robust = (rows.nonzero().flatten() for rows in (clean.correct, verdicts.robust))
        unbounded = None
        if len(correct):
            x, y = _first(plan, correct, masking.SAMPLES)
            unbounded = masking.unbounded(plan.predict, x, y, plan.norm, search=search)
        found.append(unbounded)
        if len(robust) and unbounded is None:
            x, y = _first(plan, robust, masking.SAMPLES)
            found.append(masking.transfer(plan.predict, x, y, plan.norm, plan.eps, search=search))
    return [flag for flag in found if flag is not None]
