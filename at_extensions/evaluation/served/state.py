"""``autoattack.state``: the progress of an evaluation, as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from at_extensions.runs import write_json


class EvaluationState:
    """The progress of an evaluation, with the attributes of upstream's class.

    Args:
        attacks_to_run: Names of the evaluation's attacks.
        path: The JSON file, or None to write nothing.
        run_attacks: Names of the finished ones.
        robust_flags: Which samples are robust so far (N,).
        clean_accuracy: Fraction in [0, 1].
        seed: Seed of the evaluation, used when it resumes.
    """

    def __init__(
        self,
        attacks_to_run: Iterable[str],
        path: str | Path | None = None,
        run_attacks: Iterable[str] = (),
        robust_flags: Tensor | None = None,
        clean_accuracy: float = float("nan"),
        seed: int | None = None,
    ):
        self.attacks_to_run = set(attacks_to_run)
        self.path = None if path is None else Path(path)
        self.run_attacks = set(run_attacks)
        self._robust_flags = robust_flags
        self.clean_accuracy = clean_accuracy
        self.seed = seed

    @property
    def robust_flags(self) -> Tensor | None:
        """Which samples are robust so far, as 0.0 or 1.0 (N,): RobustBench takes the mean, undefined for booleans."""
        return None if self._robust_flags is None else self._robust_flags.float()

    @robust_flags.setter
    def robust_flags(self, robust_flags: Tensor) -> None:
        self._robust_flags = robust_flags

    @property
    def robust_accuracy(self) -> float:
        """Share of the samples that are robust so far.

        Raises:
            ValueError: No sample has been evaluated yet.
        """
        if self.robust_flags is None:
            raise ValueError("robust_flags is not set yet; run the evaluation first")
        return self.robust_flags.mean().item()

    def add_run_attack(self, attack: str) -> None:
        """Note that an attack is over, and write the file."""
        self.run_attacks.add(attack)
        self.to_disk()

    def to_disk(self, force: bool = True) -> None:
        """Write the file, atomically; ``force`` is upstream's and changes nothing, since every write is quick."""
        if self.path is None:
            return
        values = {
            "attacks_to_run": sorted(self.attacks_to_run),
            "run_attacks": sorted(self.run_attacks),
            "robust_flags": None if self.robust_flags is None else [bool(flag) for flag in self.robust_flags.tolist()],
            "clean_accuracy": None if self.clean_accuracy != self.clean_accuracy else self.clean_accuracy,
            "seed": self.seed,
        }
        write_json(self.path, values)

    @classmethod
    def from_disk(cls, path: str | Path) -> EvaluationState:
        """Read a file that ``to_disk`` wrote.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not a file of this class; upstream's own cannot be resumed.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            flags, clean = values["robust_flags"], values["clean_accuracy"]
            return cls(
                values["attacks_to_run"],
                path,
                values["run_attacks"],
                None if flags is None else torch.tensor(flags, dtype=torch.bool),
                float("nan") if clean is None else clean,
                values["seed"],
            )
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a state that at-extensions wrote; give another state_path") from error
