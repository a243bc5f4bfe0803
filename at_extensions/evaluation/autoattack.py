"""``evaluate``: robust accuracy by AutoAttack, in numbered batches that resume and are shared by processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from at_extensions.attacks import attacking
from at_extensions.checks import check_count, check_eps, check_model, check_name, check_norm, device_of
from at_extensions.evaluation.batches import Clean, Listener, Plan, Verdicts
from at_extensions.evaluation.precision import check_precision
from at_extensions.evaluation.report import Examples, RobustnessReport, summary
from at_extensions.evaluation.samples import Samples
from at_extensions.evaluation.searching import search_model
from at_extensions.evaluation.sequence import run_suite
from at_extensions.evaluation.state import Batch, Store, state_digest
from at_extensions.evaluation.suite import ATTACKS, OURS, VERSIONS, apply_version, make_attackers, settings
from at_extensions.processes import sharing
from at_extensions.progress import bar
from at_extensions.runs import versions
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

    The model is evaluated in eval mode on its device; its modes, parameters, gradients and buffers, the global random
    generators and the tracer are left as they were. AutoAttack's attacks search batch by batch; an adversarial example
    counts if it fools the model as given, in float32, and lies in the eps-ball and in [0, 1]. Batch b draws its random
    numbers from ``seed + b``, so the same call on the same machine gives the same verdicts. The precision of float32
    products on a GPU follows torch's settings (``torch.backends``), which are not changed.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K), in float32.
        data: Images (N, C, H, W) in [0, 1], as a float tensor or NumPy array in any memory layout; or a map-style
            dataset of (image, label), which is read in batches, so that memory does not grow with its size.
        labels: Class numbers (N,), for images in a tensor or array. Some classes may have no sample.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        eps: Radius: in (0, 1] for Linf (8/255, say), any positive number for L2 and L1.
        version: AutoAttack's ``"standard"``, ``"plus"`` or ``"rand"``; ``"pgd-50-10"`` for PGD with 50 steps and ten
            restarts (Linf and L2), the customary evaluation of single-step training; or ``"custom"``.
        attacks: For ``"custom"``: some of ``"apgd-ce"``, ``"apgd-dlr"``, ``"fab"``, ``"square"``, ``"apgd-t"``,
            ``"fab-t"``, ``"pgd-50-10"``, in the order in which they run, AutoAttack's with the settings of its standard
            version.
        seed: Start of the random draws.
        batch_size: Samples a batch; None takes 250, fewer for images larger than 64 x 64.
        n_examples: Evaluate a random subset of this many, drawn by ``seed``; None takes all.
        precision: ``"fp32"``, or ``"bf16"`` to search in bf16 and verify in fp32; images whose gradient vanishes in
            bf16 alone are searched in fp32.
        compile: Search with a model compiled by ``torch.compile``.
        state_dir: A folder for finished batches: an interrupted run resumes from there and ends with the verdicts of
            an uninterrupted one. It is tied to the model, the data, the settings, and the device's arithmetic.
        class_counts: Training samples of each class (K,), to report accuracy on head, medium and tail classes.
        keep_examples: Largest number of adversarial examples in the report's ``examples``. Those of APGD fool the model
            by a smaller margin than upstream's, because images are discarded once they are clearly fooled.
        shard: Deal the batches over the processes where a torch.distributed job runs or ``torchrun`` started this one;
            every process then makes this call and gets the same report. False evaluates on this process alone.
        progress: Show a bar for each attack on a terminal; elsewhere, a line after each attack, and one a minute.

    Returns:
        Accuracies, verdicts by sample, and flags that qualify them.

    Raises:
        TypeError: Arguments of the wrong type, such as uint8 images.
        ValueError: eps, images or labels out of range, unknown names, a model that does not return logits (B, K) in
            float32, a ``state_dir`` that belongs to another evaluation.
    """
    eps = check_eps(eps, check_norm(norm))
    check_count("keep_examples", keep_examples, at_least=0)
    attacks = _attack_names(check_name("version", version, VERSIONS), attacks, norm)
    device = device_of(_check_float32(check_model(model)))
    check_precision("precision", precision, device)
    _check_unit_interval(data)
    samples = Samples(data, labels, n_examples=n_examples, seed=check_count("seed", seed, at_least=0))
    batch_size = default_batch_size(samples) if batch_size is None else check_count("batch_size", batch_size)
    attackers = make_attackers(None, norm, eps, device, only_verdicts=True)
    apply_version(attackers, "standard" if version in OURS else version, norm)
    with sharing(shard) as ranks, attacking(model):
        plan = Plan(
            model, model, samples, attackers, attacks, norm, eps, version,
            seed=seed, seed_step=1, batch_size=batch_size, device=device, strict=version == "custom",
            search=lambda x: search_model(model, x, precision, compiled=compile), precision=precision,
            masking=version in ("standard", "plus"), class_counts=class_counts,
            store=Store(state_dir), identity={"compiled": bool(compile)}, ranks=ranks, keep=keep_examples,
            listener=_Progress() if progress and ranks.rank == 0 else Listener(),
        )  # fmt: skip
        clean, verdicts, suite, flags = run_suite(plan)
    return RobustnessReport(
        norm=norm,
        eps=eps,
        version=version,
        seed=seed,
        **summary(clean.labels, clean.correct, verdicts.robust, clean.num_classes, class_counts),
        after_attack=verdicts.after_attack,
        flags=flags,
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
        examples=_examples(samples, clean, verdicts),
    )


def default_batch_size(samples: Samples) -> int:
    """Return the default number of samples a batch: AutoAttack's 250, fewer for images beyond 64 x 64."""
    images, _ = samples.fetch(torch.zeros(1, dtype=torch.long))
    return max(1, min(250, 250 * 3 * 64 * 64 // images.numel()))


def _attack_names(version: str, attacks: Sequence[str] | None, norm: str) -> tuple[str, ...]:
    if (version == "custom") != (attacks is not None):
        raise ValueError('attacks= goes with version="custom", which needs it; the other versions have their own')
    if norm == "L1" and "pgd-50-10" in (version, *(attacks or ())):
        raise ValueError("pgd-50-10 is defined for Linf and L2, not for L1")
    if attacks is None:
        return VERSIONS[version]
    if isinstance(attacks, str) or not attacks or len(set(attacks)) < len(attacks):
        raise ValueError(f"attacks must be a list of different names, got {attacks!r}")
    return tuple(check_name("attack", name, ATTACKS) for name in attacks)


def _check_unit_interval(data: Any) -> None:
    """Refuse a split whose images may leave [0, 1], before one of them happens to."""
    low, high = getattr(data, "image_range", (0.0, 1.0))
    if low < 0 or high > 1:
        raise ValueError(
            f"AutoAttack searches within [0, 1], these images lie in [{low:.4g}, {high:.4g}]; use accuracy(model, "
            "data, attack=attacks.PGD(model, eps, image_range=data.image_range)), or images without injected features"
        )


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


class _Progress(Listener):
    """One bar an attack; off a terminal, lines with the robust accuracy and the time."""

    def started(self, attack: str, share: int, done: int) -> None:
        self.bar = bar(text=attack, total=share + done, initial=done, unit="batches", every=60.0)

    def finished_batch(self, attack: str, batch: Batch) -> None:
        self.bar.update()

    def ended(self, attack: str, verdicts: Verdicts) -> None:
        self.bar.set_postfix_str(f"{100 * verdicts.after_attack[attack]:.2f} % robust accuracy")
        self.bar.close()
