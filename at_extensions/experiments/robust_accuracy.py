"""The usual measurement of a study: clean, PGD and AutoAttack accuracy of a trained run on its test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from at_extensions.attacks import PGD
from at_extensions.checks import check_count, check_eps, check_name, parse_fraction
from at_extensions.data import Injection, load_dataset
from at_extensions.data.split import LabelledSplit
from at_extensions.evaluation import RobustnessReport, count_correct, evaluate
from at_extensions.evaluation.accuracy import count_correct_by_class
from at_extensions.experiments.cell import Cell
from at_extensions.models import load_model
from at_extensions.processes import own_device
from at_extensions.runs import KINDS, RunDirectory
from at_extensions.training.metrics import by_frequency


@dataclass(frozen=True)
class RobustAccuracy:
    """Measure a run: clean and PGD accuracy of the last and the best epoch, AutoAttack on the published weights.

    For robust overfitting, ``checkpoints=("best", "last")`` meets both with AutoAttack, on the same images.

    Clean accuracy and PGD (Linf, step size eps / 4) use all test images. Attacks search on the folded model; the model
    as given judges in fp32. Images of a run with injected features have them here too; AutoAttack, which searches
    within [0, 1], must then be left out. After long-tailed training accuracies are also given by class and for head,
    medium and tail classes.

    Attributes:
        eps: Linf radius of the attacks, a number or a text such as ``"8/255"``; the run's own by default. Give it
            where the arms of a study train at different radii.
        pgd_steps: Steps of PGD; 0 leaves it out.
        autoattack: Test images for standard AutoAttack, drawn evenly over the classes: 0 for none, None for all.
        every_seed: AutoAttack for every seed, not for the first one alone.
        checkpoints: Checkpoints that AutoAttack meets, of ``"best"`` and ``"last"``; their results are then in their
            places (``best/autoattack``), and with both of them ``best_minus_last`` is the fall of robust accuracy. None
            attacks the published weights alone.
        precision: Precision in which AutoAttack searches, ``"fp32"`` or ``"bf16"``.
        pgd_precision: Precision in which PGD searches.
    """

    eps: float | str | None = None
    pgd_steps: int = 20
    autoattack: int | None = 500
    every_seed: bool = False
    checkpoints: tuple[str, ...] | None = None
    precision: str = "fp32"
    pgd_precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.eps is not None:
            check_eps(parse_fraction(self.eps))
        check_count("pgd_steps", self.pgd_steps, at_least=0)
        if self.autoattack is not None:
            check_count("autoattack", self.autoattack, at_least=0)
        for kind in self.checkpoints or ():
            check_name("checkpoint", kind, KINDS)
        check_name("precision", self.precision, ("fp32", "bf16"))
        check_name("pgd_precision", self.pgd_precision, ("fp32", "bf16"))

    def __call__(self, run: RunDirectory, cell: Cell) -> dict[str, Any]:
        """Return ``last``, ``best`` and, where it is due, ``autoattack``."""
        config = run.config()
        trained = config["data"]
        class_counts = trained["class_counts"] if trained["imbalance_ratio"] else None
        eps = parse_fraction(config["method"]["eps"] if self.eps is None else self.eps)
        attacked = self.autoattack != 0 and (cell.first_seed or self.every_seed)
        if attacked and trained.get("inject_beta") is not None:
            raise ValueError(
                "AutoAttack searches within [0, 1]; measure injected features by RobustAccuracy(autoattack=0)"
            )
        test = load_dataset(
            trained["name"],
            root=trained.get("root"),
            image_size=trained.get("image_size"),
            val_fraction=0.0,
            inject=Injection.recorded(trained),
        ).test
        result = self._by_epoch(run, test, class_counts, eps)
        if attacked:
            images = test if self.autoattack is None else test.subset(self.autoattack)
            if self.checkpoints is None:
                found = self._attacked(
                    run.published_weights(), images, class_counts, eps, run.path / "autoattack_state"
                )
                result["autoattack"] = found.to_dict()
            else:
                self._attack_checkpoints(run, images, class_counts, eps, result)
        return result

    def _attack_checkpoints(
        self, run: RunDirectory, images: LabelledSplit, class_counts: list[int] | None, eps: float, result: dict
    ) -> None:
        """Add AutoAttack's accuracy to the result of each checkpoint, and the fall from the best to the last one."""
        attacked: list[str] = []
        same = result.get("best") is result.get("last")
        for kind in self.checkpoints:
            if same and attacked:
                result[kind] = result[attacked[0]]
                continue
            found = self._attacked(run.weights(kind), images, class_counts, eps, run.path / f"autoattack_state_{kind}")
            result[kind] = result[kind] | {
                "autoattack": {
                    "correct": int(found.robust.sum()),
                    "images": found.n_examples,
                    "accuracy": found.robust_accuracy,
                    "interval": list(found.interval),
                    "robust": found.robust.tolist(),
                    "seconds": found.seconds,
                }
            }
            attacked.append(kind)
        if set(self.checkpoints) == set(KINDS):
            best, last = (result[kind]["autoattack"]["accuracy"] for kind in ("best", "last"))
            result["best_minus_last"] = best - last

    def _attacked(
        self, weights: Path, images: LabelledSplit, class_counts: list[int] | None, eps: float, state_dir: Path
    ) -> RobustnessReport:
        return evaluate(
            load_model(weights).to(own_device()),
            images,
            eps=eps,
            state_dir=state_dir,
            class_counts=class_counts,
            precision=self.precision,
        )

    def _by_epoch(
        self, run: RunDirectory, test: LabelledSplit, class_counts: list[int] | None, eps: float
    ) -> dict[str, Any]:
        """Return clean and PGD accuracy of each checkpoint; a best epoch that is the last one is measured once."""
        result: dict[str, Any] = {}
        for kind in KINDS:
            if not run.weights(kind).is_file():
                continue
            if "last" in result and run.weights(kind).read_bytes() == run.weights("last").read_bytes():
                result[kind] = result["last"]
                continue
            model = load_model(run.weights(kind)).to(own_device())
            result[kind] = {"clean": self._accuracies(model, test, class_counts)}
            if self.pgd_steps:
                attack = PGD(model, eps, eps / 4, self.pgd_steps, image_range=test.image_range)
                result[kind][f"pgd{self.pgd_steps}"] = self._accuracies(model, test, class_counts, attack)
        return result

    def _accuracies(
        self, model: nn.Module, test: LabelledSplit, class_counts: list[int] | None, attack: PGD | None = None
    ) -> dict[str, Any]:
        """Return the accuracy on the test split, under an attack if given; by class where counts are given."""
        if class_counts is None:
            return _share(count_correct(model, test, attack=attack, search=self.pgd_precision))
        counts = count_correct_by_class(model, test, len(class_counts), attack=attack, search=self.pgd_precision).cpu()
        by_class = by_frequency({"test": counts}, class_counts)
        return _share(counts.sum(0)) | {name: values["test"] for name, values in by_class.items()}


def _share(counts: torch.Tensor) -> dict[str, Any]:
    """Return the correct samples, all samples, and their ratio."""
    right, total = counts.tolist()
    return {"correct": right, "images": total, "accuracy": right / total}
