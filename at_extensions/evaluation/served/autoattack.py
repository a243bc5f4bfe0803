"""``autoattack.AutoAttack``: upstream's interface to our evaluation, so that scripts written for it run and resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from at_extensions.checks import check_eps, check_name, check_norm
from at_extensions.evaluation.batches import Clean, Listener, Plan, Verdicts
from at_extensions.evaluation.flags import Flag
from at_extensions.evaluation.samples import Samples
from at_extensions.evaluation.sequence import run_suite
from at_extensions.evaluation.served.state import EvaluationState
from at_extensions.evaluation.state import Batch, Store
from at_extensions.evaluation.suite import OURS, VERSIONS, apply_version, make_attackers
from at_extensions.evaluation.verification import ORDER
from at_extensions.untouched import frozen
from at_extensions.upstream import attack_module


class AutoAttack:
    """AutoAttack (Croce & Hein 2020, arXiv 2003.01690) with upstream's interface.

    Differences from upstream: an evaluation resumes from the last finished batch; DLR-based attacks are left out where
    they are undefined, and target classes never outnumber the other classes; global random generators, the tracer and
    the model's gradients are not changed; images must lie in [0, 1]. As in upstream, the model stays in its mode.

    Args:
        model: Anything that maps images (B, C, H, W) to logits (B, K).
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        eps: Radius.
        seed: Seed of every batch; the time if None.
        verbose: Whether to log the progress.
        attacks_to_run: Names of attacks, for ``version="custom"``.
        version: ``"standard"``, ``"plus"``, ``"rand"`` or ``"custom"``.
        is_tf_model: TensorFlow models need upstream's own package.
        device: Where the model is.
        log_path: File to append the log to.

    Attributes:
        apgd: APGD; its settings may be changed, such as ``n_restarts`` or ``n_iter``, and so those of the next three.
        apgd_targeted: Targeted APGD.
        fab: FAB (``evaluation.attacks.fab.FAB``, with upstream's settings).
        square: Square.

    Raises:
        NotImplementedError: A TensorFlow model.
        ValueError: eps out of range, unknown names, attacks for another version than custom.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str = "cuda",
        log_path: str | Path | None = None,
    ):
        if is_tf_model:
            raise NotImplementedError("TensorFlow models need upstream's autoattack: github.com/fra31/auto-attack")
        if version != "custom" and len(attacks_to_run):
            raise ValueError("attacks_to_run will be overridden unless you use version='custom'")
        self.model, self.norm, self.epsilon = model, check_norm(norm), check_eps(eps, norm)
        self.seed, self.verbose, self.is_tf_model, self.device = seed, verbose, is_tf_model, device
        self.attacks_to_run, self.version = list(attacks_to_run), version
        self.logger = attack_module("other_utils").Logger(log_path)
        attackers = make_attackers(model, norm, self.epsilon, device, seed=seed, logger=self.logger)
        self.apgd, self.apgd_targeted = attackers.apgd, attackers.apgd_targeted
        self.fab, self.square = attackers.fab, attackers.square
        if version != "custom":
            self.set_version(version)

    def set_version(self, version: str = "standard") -> None:
        """Give the attacks a version's settings, and choose those that the version runs."""
        check_name("version", version, [name for name in VERSIONS if name not in OURS])
        self._log(f"setting parameters for {version} version")
        apply_version(self, version, self.norm)
        self.attacks_to_run = list(VERSIONS[version])

    def get_logits(self, x: Tensor) -> Tensor:
        """Return the model's logits (B, K)."""
        return self.model(x)

    def get_seed(self) -> float:
        """Return the seed, or the time if there is none."""
        return time.time() if self.seed is None else self.seed

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the attacks one after the other, each on the images that are robust against those before it.

        Args:
            x_orig: Images (N, C, H, W) in [0, 1].
            y_orig: Their classes (N,).
            bs: Images a batch.
            return_labels: Also return the predicted classes.
            state_path: JSON file with the progress; finished batches, with their adversarial examples, are stored in a
                folder beside it (``.batches``). An interrupted run resumes from there.

        Returns:
            Images (N, C, H, W), adversarial where an attack succeeded; with ``return_labels`` also the classes
            predicted for them (N,).

        Raises:
            ValueError: Images or labels out of range, or a state of another evaluation.
        """
        verdicts = self._run(Samples(x_orig, y_orig), bs, self.attacks_to_run, state_path)
        x_adv = x_orig.detach().clone()
        for row, image in verdicts.adversarial:
            x_adv[row] = image.to(x_adv)
        if self.verbose:
            self._log_perturbation(x_adv - x_orig, x_adv, verdicts)
        return (x_adv, verdicts.predictions.to(y_orig)) if return_labels else x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Tensor] | dict[str, tuple[Tensor, Tensor]]:
        """Run each attack by itself on all images; arguments and each result as in ``run_standard_evaluation``."""
        results, before = {}, (self.attacks_to_run, self.verbose)
        try:
            for attack in before[0]:
                self.attacks_to_run, self.verbose, start = [attack], False, time.perf_counter()
                x_adv, y_adv = self.run_standard_evaluation(x_orig, y_orig, bs=bs, return_labels=True)
                results[attack] = (x_adv, y_adv) if return_labels else x_adv
                self.verbose = before[1]
                robust, spent = (y_adv == y_orig).double().mean().item(), time.perf_counter() - start
                self._log(f"robust accuracy by {attack.upper()} \t {robust:.2%} \t (time attack: {spent:.1f} s)")
        finally:
            self.attacks_to_run, self.verbose = before
        return results

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Return the share of the images (N, C, H, W) that are classified as ``y_orig`` (N,)."""
        correct = 0
        with torch.no_grad():
            for x, y in zip(x_orig.split(bs), y_orig.split(bs)):
                correct += int((self.get_logits(x.to(self.device)).argmax(1) == y.to(self.device)).sum())
        self._log(f"clean accuracy: {correct / len(x_orig):.2%}")
        return correct / len(x_orig)

    def _run(self, samples: Samples, bs: int, attacks: Sequence[str], state_path: str | Path | None) -> Verdicts:
        self._log(f"using {self.version} version including {', '.join(attacks)}.")
        state = self._state(state_path, attacks)
        seed = state.seed if self.seed is None else int(self.seed)
        with frozen(self.model):
            plan = Plan(
                self.model, self.get_logits, samples, self, attacks, self.norm, self.epsilon, self.version,
                seed=seed, seed_step=0, batch_size=bs, device=torch.device(self.device),
                store=Store(None if state_path is None else f"{state_path}.batches"),
                listener=_Log(self._log, self.logger.log, state),
            )  # fmt: skip
            return run_suite(plan).verdicts

    def _state(self, path: str | Path | None, attacks: Sequence[str]) -> EvaluationState:
        """A new state or the one on disk."""
        if path is not None and Path(path).exists():
            state = EvaluationState.from_disk(path)
            self._log(f"Restored state from {path}")
        else:
            state = EvaluationState(attacks, path, seed=int(self.get_seed()))
        if state.attacks_to_run != set(attacks):
            raise ValueError(
                "The state was created with a different set of attacks to run. You are probably using the wrong state "
                "file."
            )
        return state

    def _log(self, message: str) -> None:
        if self.verbose:
            self.logger.log(message)

    def _log_perturbation(self, delta: Tensor, x_adv: Tensor, verdicts: Verdicts) -> None:
        size = torch.linalg.vector_norm(delta.flatten(1), ord=ORDER[self.norm], dim=1).max()
        self._log(
            f"max {self.norm} perturbation: {size:.5f}, nan in tensor: {int(x_adv.isnan().sum())}, "
            f"max: {x_adv.max():.5f}, min: {x_adv.min():.5f}"
        )
        self._log(f"robust accuracy: {verdicts.robust.double().mean().item():.2%}")


class _Log(Listener):
    """Logs as upstream does, and keeps the state file up to date."""

    def __init__(self, log: Callable[[str], None], warn: Callable[[str], None], state: EvaluationState):
        self.log, self.warn, self.state, self.start = log, warn, state, time.perf_counter()

    def classified(self, clean: Clean) -> None:
        self.state.clean_accuracy, self.state.robust_flags = clean.correct.double().mean().item(), clean.correct
        self.state.to_disk()
        self.log(f"initial accuracy: {self.state.clean_accuracy:.2%}")

    def flagged(self, flags: Sequence[Flag]) -> None:
        for flag in flags:
            self.warn(f"Warning: {flag.message}.")

    def started(self, attack: str, share: int, done: int) -> None:
        self.total = share + done

    def finished_batch(self, attack: str, batch: Batch) -> None:
        broken, tried = int(batch.broken.sum()), len(batch.rows)
        self.log(f"{attack} - {batch.number + 1}/{self.total} - {broken} out of {tried} successfully perturbed")

    def ended(self, attack: str, verdicts: Verdicts) -> None:
        spent, robust = time.perf_counter() - self.start, verdicts.after_attack[attack]
        self.log(f"robust accuracy after {attack.upper()}: {robust:.2%} (total time {spent:.1f} s)")
        self.state.robust_flags = verdicts.robust
        self.state.add_run_attack(attack)
