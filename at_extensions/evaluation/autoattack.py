"""Evaluate a model by AutoAttack, in numbered batches that resume, shard and leave nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from at_extensions.attacks import attacking
from at_extensions.checks import (
    check_class_counts,
    check_count,
    check_eps,
    check_model,
    check_name,
    check_norm,
    device_of,
)
from at_extensions.evaluation import flags as signs
from at_extensions.evaluation import masking
from at_extensions.evaluation.driver import Clean, Driver, Listener, Predict, Verdicts, clean_pass
from at_extensions.evaluation.flags import Flag
from at_extensions.evaluation.report import Examples, RobustnessReport, summary
from at_extensions.evaluation.samples import Samples
from at_extensions.evaluation.searching import PRECISIONS, search_model
from at_extensions.evaluation.state import Batch, Store, state_digest, weights_digest
from at_extensions.evaluation.suite import (
    ATTACKS,
    VERSIONS,
    apply_version,
    by_name,
    check_usable,
    defined_for,
    make_attackers,
    settings,
)
from at_extensions.processes import Ranks, sharing
from at_extensions.progress import bar
from at_extensions.runs import versions
from at_extensions.untouched import isolated
from at_extensions.upstream import backend_version


def evaluate(
    model: nn.Module,
    data: Any,
    labels: Tensor | None = None,
    *,
    norm: str = "Linf",
    eps: float,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    n_examples: int | None = None,
    precision: str = "fp32",
    compile: bool = False,
    state_dir: str | Path | None = None,
    class_counts: Sequence[int] | None = None,
    keep_examples: int = 8,
    shard: bool = True,
    progress: bool = True,
) -> RobustnessReport:
    """Evaluate a model by AutoAttack (Croce & Hein 2020, arXiv 2003.01690).

    The model is evaluated in eval mode where it is; its modes, parameters, gradients and buffers, the global random
    generators and the tracer are left as they were. AutoAttack's attacks search batch by batch; an adversarial example
    counts when the model as given, in float32, is fooled by it and it lies in the eps-ball and in [0, 1]. Batch b draws
    its random numbers from ``seed + b``, so the same call on the same machine gives the same verdicts. On a GPU float32
    is what torch's settings make of it (``torch.backends``), and those are left alone too.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K), in float32.
        data: Images (N, C, H, W) in [0, 1], or a map-style dataset of (image, label); it is read in batches, so memory
            does not grow with its size.
        labels: Class numbers (N,), for images that come as a tensor.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        eps: Radius: in (0, 1] for Linf (8/255, say), any positive number for L2 and L1.
        version: AutoAttack's ``"standard"``, ``"plus"`` or ``"rand"``, or ``"custom"``.
        attacks: For ``"custom"``: some of ``"apgd-ce"``, ``"apgd-dlr"``, ``"fab"``, ``"square"``, ``"apgd-t"``,
            ``"fab-t"``, in the order to run them, each with the standard version's settings.
        seed: Start of the random draws.
        batch_size: Samples a batch; None takes 250, fewer for images larger than 64 x 64.
        n_examples: Evaluate a random subset of this many, drawn by ``seed``; None takes all.
        precision: ``"fp32"``, or ``"bf16"`` to search in bf16 and verify in fp32.
        compile: Search with a model compiled by ``torch.compile``.
        state_dir: A folder for finished batches: a run that was stopped goes on from there and ends with the verdicts
            that it would have had.
        class_counts: Training samples of each class (K,), to report accuracy on head, medium and tail classes.
        keep_examples: How many broken samples the report's ``examples`` hold at most. They fool the model, but APGD's
            not by as much as upstream's: it lets go of what is fooled beyond doubt.
        shard: Deal the batches over the processes where a torch.distributed job runs or ``torchrun`` started this one;
            every process then makes this call and gets the same report. False evaluates on this process alone.
        progress: Show the progress of each attack: a bar on a terminal, else lines.

    Returns:
        Accuracies, verdicts by sample, and what a reader must know about them.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: eps, images or labels out of range, unknown names, a model that does not return logits (B, K) in
            float32, a ``state_dir`` that belongs to another evaluation.
    """
    eps = check_eps(eps, check_norm(norm))
    check_name("precision", precision, PRECISIONS)
    check_count("keep_examples", keep_examples, at_least=0)
    attacks = _attack_names(check_name("version", version, VERSIONS), attacks)
    device = device_of(_check_float32(check_model(model)))
    samples = Samples(data, labels, n_examples=n_examples, seed=check_count("seed", seed, at_least=0))
    batch_size = default_batch_size(samples) if batch_size is None else check_count("batch_size", batch_size)
    plan = _Plan(model, samples, norm, eps, version, attacks, seed, batch_size, precision, bool(compile), device)
    with sharing(shard) as ranks, isolated(device), attacking(model), torch.no_grad():
        torch.manual_seed(seed)  # for models that draw random numbers themselves
        clean = clean_pass(model, samples, batch_size, device, ranks)
        with ranks.in_step():
            if class_counts is not None:
                class_counts = check_class_counts(class_counts, clean.num_classes)
            suite, few_classes = plan.suite(clean.num_classes)
            x, y = plan.first(torch.arange(len(samples)), batch_size)
            flags = [few_classes, *signs.inspect(check_usable(suite, model, x), x, y, version=version)]
            search = search_model(model, x, precision, compiled=compile)
        verdicts = Driver(
            model, samples, suite, norm, eps, seed_of=lambda number: seed + number, batch_size=batch_size,
            device=device, search=search, store=plan.claimed(Store(state_dir), suite, ranks), ranks=ranks,
            keep=keep_examples, listener=_Bars() if progress and ranks.rank == 0 else None,
        ).run(clean)  # fmt: skip
        with ranks.in_step():
            flags += plan.signs_of_masking(clean, verdicts, search if precision == "fp32" else model)
            examples = _examples(samples, clean, verdicts)
        flags = ranks.gather(flags)[0]
    return RobustnessReport(
        norm=norm,
        eps=eps,
        version=version,
        seed=seed,
        **summary(clean.labels, clean.correct, verdicts.robust, clean.num_classes, class_counts),
        after_attack=verdicts.after_attack,
        flags=[flag for flag in flags if flag is not None],
        settings={name: settings(attack) for name, attack in suite.items()},
        versions=versions() | {"autoattack": backend_version()},
        device=_device_name(device),
        precision=precision,
        batch_size=batch_size,
        seconds=clean.seconds + sum(verdicts.seconds.values()),
        attack_seconds=verdicts.seconds,
        weights=state_digest(model),
        data=samples.digest(),
        compiled=bool(compile),
        indices=None if samples.all else samples.indices.tolist(),
        examples=examples,
    )


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is evaluated, and how."""

    model: nn.Module
    samples: Samples
    norm: str
    eps: float
    version: str
    attacks: tuple[str, ...]
    seed: int
    batch_size: int
    precision: str
    compiled: bool
    device: torch.device

    def suite(self, num_classes: int) -> tuple[dict[str, Any], Flag | None]:
        """The attack objects by name, and a flag if some are left out because there are so few classes."""
        names, few_classes = defined_for(self.attacks, num_classes)
        if few_classes is not None and self.version == "custom":
            raise ValueError(f"with {num_classes} classes some attacks are undefined: {few_classes.message}")
        attackers = make_attackers(None, self.norm, self.eps, self.device, only_verdicts=True)
        apply_version(attackers, "standard" if self.version == "custom" else self.version, self.norm)
        return by_name(attackers, names, num_classes), few_classes

    def first(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The images and labels of the first ``count`` of the rows, on the model's device."""
        x, y = self.samples.read(rows[: min(count, self.batch_size)])
        return x.to(self.device), y.to(self.device)

    def claimed(self, store: Store, suite: dict[str, Any], ranks: Ranks) -> Store:
        """Tie the store to this evaluation, and see to it that all processes are at the same one."""
        if store.directory is None and ranks.world == 1:
            return store
        identity = {
            "weights": weights_digest(self.model),
            "data": self.samples.digest(),
            "suite": list(suite),
            "attacks": {name: settings(attack) for name, attack in suite.items()},
            "backend": backend_version(),
            **{name: getattr(self, name) for name in ("norm", "eps", "seed", "batch_size", "precision", "compiled")},
        }
        for rank, theirs in enumerate(ranks.gather(identity)):
            other = [key for key in identity if theirs[key] != identity[key]]
            if other:
                raise ValueError(f"rank {ranks.rank} and rank {rank} evaluate different things: {', '.join(other)}")
        ranks.together(lambda: store.claim(identity, write=ranks.rank == 0))
        return store

    def signs_of_masking(self, clean: Clean, verdicts: Verdicts, search: Predict) -> list[Flag | None]:
        """What the attacks, and two short ones of our own on ``search``, say of the model's gradients."""
        square = signs.square_improves(verdicts.after_attack, len(clean.labels))
        found = [signs.zero_gradients(verdicts.zero_gradients), square]
        if self.version != "rand":
            found.append(signs.nondeterministic(verdicts.contradicted, len(self.samples)))
        if self.version in ("standard", "plus"):
            torch.manual_seed(self.seed)  # whatever was drawn before, by this run or one that it goes on from
            right, standing = (rows.nonzero().flatten() for rows in (clean.correct, verdicts.robust))
            if len(right):
                found.append(
                    masking.unbounded(self.model, *self.first(right, masking.SAMPLES), self.norm, search=search)
                )
            if len(standing) and found[-1] is None:
                x, y = self.first(standing, masking.SAMPLES)
                found.append(masking.transfer(self.model, x, y, self.norm, self.eps, search=search))
        return found


def default_batch_size(samples: Samples) -> int:
    """Return how many samples a batch holds if nobody says: AutoAttack's 250, fewer for images beyond 64 x 64."""
    images, _ = samples.fetch(torch.zeros(1, dtype=torch.long))
    return max(1, min(250, 250 * 3 * 64 * 64 // images.numel()))


def _attack_names(version: str, attacks: Sequence[str] | None) -> tuple[str, ...]:
    if (version == "custom") != (attacks is not None):
        raise ValueError('attacks= goes with version="custom", which needs it; the other versions bring their own')
    if attacks is None:
        return VERSIONS[version]
    if isinstance(attacks, str) or not attacks or len(set(attacks)) < len(attacks):
        raise ValueError(f"attacks must be a list of different names, got {attacks!r}")
    return tuple(check_name("attack", name, ATTACKS) for name in attacks)


def _check_float32(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; evaluate a float32 model: model.float()")
    return model


def _examples(samples: Samples, clean: Clean, verdicts: Verdicts) -> Examples | None:
    if not verdicts.adversarial:
        return None
    rows = torch.tensor([row for row, _ in verdicts.adversarial])
    return Examples(
        images=samples.read(rows)[0].cpu(),
        adversarial=torch.stack([image for _, image in verdicts.adversarial]),
        labels=clean.labels[rows],
        clean_predictions=clean.predictions[rows],
        adversarial_predictions=verdicts.predictions[rows],
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Bars(Listener):
    """One bar an attack, with the time left; lines in a log file."""

    def started(self, attack: str, share: int, done: int) -> None:
        self.bar = bar(text=attack, total=share + done, initial=done, unit="batches", every=60)

    def finished_batch(self, attack: str, batch: Batch) -> None:
        self.bar.update()

    def ended(self, attack: str, verdicts: Verdicts) -> None:
        self.bar.set_postfix_str(f"{100 * verdicts.after_attack[attack]:.2f} % left")
        self.bar.close()
