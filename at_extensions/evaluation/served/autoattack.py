"""``autoattack.AutoAttack``: upstream's class over our driver, so that scripts written for it run and resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from at_extensions.checks import check_eps, check_name, check_norm
from at_extensions.evaluation import flags as signs
from at_extensions.evaluation.driver import Clean, Driver, Listener, Verdicts, clean_pass
from at_extensions.evaluation.samples import Samples
from at_extensions.evaluation.served.state import EvaluationState
from at_extensions.evaluation.state import Batch, Store, weights_digest
from at_extensions.evaluation.suite import (
    VERSIONS,
    apply_version,
    by_name,
    check_usable,
    defined_for,
    make_attackers,
    settings,
)
from at_extensions.evaluation.verification import ORDER
from at_extensions.processes import Ranks
from at_extensions.untouched import frozen, isolated
from at_extensions.upstream import attack_module, backend_version


class AutoAttack:
    """AutoAttack (Croce & Hein 2020, arXiv 2003.01690) with upstream's interface.

    What differs from upstream: a state goes on from the last finished batch; DLR-based attacks are left out where they
    are undefined and target classes never outnumber the others; global random generators, the tracer and the model's
    gradients are left alone; images must lie in [0, 1]. As upstream does, the model is attacked in the mode it is in.

    Args:
        model: Anything that maps images (B, C, H, W) to logits (B, K).
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        eps: Radius.
        seed: Seed of every batch; None takes the time.
        verbose: Whether to log how it goes.
        attacks_to_run: Names of attacks, for ``version="custom"``.
        version: ``"standard"``, ``"plus"``, ``"rand"`` or ``"custom"``.
        is_tf_model: TensorFlow models need upstream's own package.
        device: Where the model is.
        log_path: File to append the log to.

    Attributes:
        apgd: APGD; its settings may be changed, such as ``n_restarts`` or ``n_iter``, and so those of the next three.
        apgd_targeted: Targeted APGD.
        fab: FAB.
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
        """Give the attacks a version's settings, and run those that make it up."""
        check_name("version", version, [name for name in VERSIONS if name != "custom"])
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
        """Run the attacks one after the other, each on the images that the ones before left standing.

        Args:
            x_orig: Images (N, C, H, W) in [0, 1].
            y_orig: Their classes (N,).
            bs: Images a batch.
            return_labels: Also return the predicted classes.
            state_path: JSON file on how far the evaluation is; finished batches, with their adversarial examples, lie
                in a folder beside it (``.batches``). A run that was stopped goes on from there.

        Returns:
            Images (N, C, H, W), adversarial where an attack found one; with ``return_labels`` also what the model
            predicts for them (N,).

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
        """Run each attack by itself on all images; arguments and results, by attack, as ``run_standard_evaluation``."""
        results, before = {}, (self.attacks_to_run, self.verbose)
        try:
            for attack in before[0]:
                self.attacks_to_run, self.verbose, start = [attack], False, time.perf_counter()
                x_adv, y_adv = self.run_standard_evaluation(x_orig, y_orig, bs=bs, return_labels=True)
                results[attack] = (x_adv, y_adv) if return_labels else x_adv
                self.verbose = before[1]
                left, spent = (y_adv == y_orig).double().mean().item(), time.perf_counter() - start
                self._log(f"robust accuracy by {attack.upper()} \t {left:.2%} \t (time attack: {spent:.1f} s)")
        finally:
            self.attacks_to_run, self.verbose = before
        return results

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Return the share of the images (N, C, H, W) that are classified as ``y_orig`` (N,)."""
        right = 0
        with torch.no_grad():
            for x, y in zip(x_orig.split(bs), y_orig.split(bs)):
                right += int((self.get_logits(x.to(self.device)).argmax(1) == y.to(self.device)).sum())
        self._log(f"clean accuracy: {right / len(x_orig):.2%}")
        return right / len(x_orig)

    def _run(self, samples: Samples, bs: int, attacks: Sequence[str], state_path: str | Path | None) -> Verdicts:
        device = torch.device(self.device)
        self._log(f"using {self.version} version including {', '.join(attacks)}.")
        state, seed_of = self._state(state_path, attacks)
        with isolated(device), frozen(self.model):
            torch.manual_seed(seed_of(0))
            clean = clean_pass(self.get_logits, samples, bs, device, Ranks())
            names, few_classes = defined_for(attacks, clean.num_classes)
            suite = by_name(self, names, clean.num_classes)
            x, y = (t.to(device) for t in samples.read(torch.arange(min(bs, len(samples)))))
            check_usable(suite, self.get_logits, x)
            self._warn([few_classes, *signs.inspect(self.get_logits, x, y, version=self.version)])
            store = Store(None if state_path is None else f"{state_path}.batches")
            if state_path is not None:
                store.claim(self._identity(samples, clean, suite, seed_of(0), bs))
            state.clean_accuracy, state.robust_flags = clean.correct.double().mean().item(), clean.correct
            state.to_disk()
            self._log(f"initial accuracy: {state.clean_accuracy:.2%}")
            verdicts = Driver(
                self.get_logits, samples, suite, self.norm, self.epsilon, seed_of=seed_of, batch_size=bs,
                device=device, store=store, listener=_Log(self._log, state),
            ).run(clean)  # fmt: skip
        square = signs.square_improves(verdicts.after_attack, len(clean.labels))
        self._warn([signs.zero_gradients(verdicts.zero_gradients), square])
        return verdicts

    def _state(self, path: str | Path | None, attacks: Sequence[str]) -> tuple[EvaluationState, Callable[[int], int]]:
        """A new state or the one on disk, and each batch's seed: upstream's own, the same one for all."""
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
        seed = state.seed if self.seed is None else int(self.seed)
        return state, lambda number: seed

    def _identity(self, samples: Samples, clean: Clean, suite: dict[str, Any], seed: int, bs: int) -> dict[str, Any]:
        """What a state is tied to; a model that is no module is known by its predictions."""
        model = weights_digest(self.model)
        if not isinstance(self.model, torch.nn.Module):
            model += f" {clean.predictions.tolist()}"
        return {
            "weights": model,
            "data": samples.digest(),
            "suite": list(suite),
            "attacks": {name: settings(attack) for name, attack in suite.items()},
            "norm": self.norm,
            "eps": self.epsilon,
            "seed": seed,
            "batch_size": bs,
            "seeding": "one seed",
            "backend": backend_version(),
        }

    def _log(self, message: str) -> None:
        if self.verbose:
            self.logger.log(message)

    def _warn(self, flags: Sequence[signs.Flag | None]) -> None:
        for flag in flags:
            if flag is not None:
                self.logger.log(f"Warning: {flag.message}.")

    def _log_perturbation(self, delta: Tensor, x_adv: Tensor, verdicts: Verdicts) -> None:
        size = torch.linalg.vector_norm(delta.flatten(1), ord=ORDER[self.norm], dim=1).max()
        self._log(
            f"max {self.norm} perturbation: {size:.5f}, nan in tensor: {int(x_adv.isnan().sum())}, "
            f"max: {x_adv.max():.5f}, min: {x_adv.min():.5f}"
        )
        self._log(f"robust accuracy: {verdicts.robust.double().mean().item():.2%}")


class _Log(Listener):
    """Logs as upstream does, and keeps the state file up to date."""

    def __init__(self, log: Callable[[str], None], state: EvaluationState):
        self.log, self.state, self.start = log, state, time.perf_counter()

    def started(self, attack: str, share: int, done: int) -> None:
        self.total = share + done

    def finished_batch(self, attack: str, batch: Batch) -> None:
        broken, tried = int(batch.broken.sum()), len(batch.rows)
        self.log(f"{attack} - {batch.number + 1}/{self.total} - {broken} out of {tried} successfully perturbed")

    def ended(self, attack: str, verdicts: Verdicts) -> None:
        spent, left = time.perf_counter() - self.start, verdicts.after_attack[attack]
        self.log(f"robust accuracy after {attack.upper()}: {left:.2%} (total time {spent:.1f} s)")
        self.state.robust_flags = verdicts.robust
        self.state.add_run_attack(attack)
