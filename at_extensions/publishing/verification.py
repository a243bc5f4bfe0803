"""Verification of a published folder: hashes, schema, and the numbers, measured again in a fresh process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from at_extensions.checks import check_count, parse_fraction
from at_extensions.data import DATASETS
from at_extensions.evaluation import RobustnessReport, count_correct, evaluate
from at_extensions.evaluation.report import wilson_interval
from at_extensions.publishing.submission import CHECKSUMS, contradictions, sha256
from at_extensions.publishing.zoo import Published, open_published, register, runs_code
from at_extensions.runs import RunDirectory

CLEAN_TOLERANCE = 0.0005
"""How far clean accuracy may be from the one claimed: other hardware rounds otherwise."""
FLIPS = 0.02
"""Share of images whose verdict may turn to broken when AutoAttack draws anew (one image at least)."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: The subject.
        passed: Whether it agrees with the folder's claim.
        detail: The finding, in a sentence.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """The result of ``verify``.

    Attributes:
        folder: The folder.
        checks: In the order they ran; a failure of the files ends them.
    """

    folder: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {"folder": self.folder, "passed": self.passed, "checks": [asdict(check) for check in self.checks]}

    def __repr__(self) -> str:
        rows = [f"  {'pass' if c.passed else 'FAIL'}  {c.name:<16}{c.detail}" for c in self.checks]
        return "\n".join([f"Verification of {self.folder}: {'pass' if self.passed else 'FAIL'}", *rows])


def verify(
    folder: str | Path,
    *,
    n_examples: int = 100,
    data: str | None = None,
    root: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    trust_code: bool = False,
) -> Verification:
    """Check a folder that ``publish`` wrote: hashes, schema, clean accuracy, and AutoAttack on some of the images.

    The model is loaded in a fresh process by RobustBench's own ``load_model``, after ``register``; nothing in the
    folder is unpickled, and none of its code is run but with ``trust_code``. AutoAttack's verdicts are compared image
    by image where the folder holds the verdicts on all of them, else through the 95 % interval of the measurement.

    Args:
        folder: The folder.
        n_examples: How many test images AutoAttack attacks; a random subset, drawn by ``seed``.
        data: Test data, as ``load_test`` names them; the published data set if None, or the file that the folder's
            ``config.yaml`` names where it is under ``root``.
        root: Folder that holds the data, in torchvision's layout.
        seed: Of the subset and the attacks.
        device: Where to run; a GPU where there is one if None.
        trust_code: Run the code in the folder where that makes its network (``zoo_entry.py`` imports it).

    Raises:
        FileNotFoundError: No such folder, or no such data.
        TypeError, ValueError: ``n_examples`` is no positive number; the network is code in the folder, which must be
            trusted first; data that cannot be named.
        RuntimeError: The fresh process failed; its error is shown.
    """
    folder = Path(folder)
    check_count("n_examples", n_examples)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    checks = [_check_files(folder)]
    try:
        published = open_published(folder)
        report = RobustnessReport.load(folder / "evaluation.json")
        checks.append(_check_result(published, report))
    except (FileNotFoundError, ValueError) as error:
        checks.append(Check("result", False, str(error)))
    if all(check.passed for check in checks):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if runs_code(folder) and not trust_code:
            raise ValueError(
                f"the network of {folder} is code that lies in it; read {folder / 'zoo_entry.py'} and the file that it "
                "imports, then pass trust_code (--trust-code) to run them"
            )
        task = {"folder": str(folder.resolve()), "test": _test_data(folder, published, data, root)}
        task |= {"n_examples": n_examples, "seed": seed, "device": device}
        checks += compare(report, _in_fresh_process(task))
    return Verification(str(folder), tuple(checks))


def _test_data(folder: Path, published: Published, data: str | None, root: str | Path | None) -> dict[str, Any]:
    """Return the arguments of ``load_test`` for the data of a folder."""
    recorded = RunDirectory(folder).config().get("data") or {}
    name, options = str(recorded.get("name")), {}
    path = name.partition(":")[2]
    if data is None:
        named = published.dataset if published.dataset in DATASETS else name
        data = name if path and (Path(root or ".") / path).exists() else named
    for key, kinds in (("image_size", ("folder",)), ("severity", ("cifar10c", "cifar100c")), ("num_classes", ("npz",))):
        if recorded.get(key) is not None and data.partition(":")[0] in kinds:
            options[key] = recorded[key]
    return {"name_or_path": data, "root": None if root is None else str(root)} | options


def _check_files(folder: Path) -> Check:
    """Compare the files with the list of their hashes."""
    listed: dict[str, str] = {}
    if not (folder / CHECKSUMS).is_file():
        return Check("files", False, f"{CHECKSUMS} is missing")
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        if match is None or PurePosixPath(match[2]).is_absolute() or ".." in PurePosixPath(match[2]).parts:
            return Check("files", False, f"{CHECKSUMS} has a line that is none: {line[:80]!r}")
        listed[match[2]] = match[1]
    present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    present.pop(CHECKSUMS, None)
    wrong = [f"{name} is missing" for name in sorted(listed.keys() - present.keys())]
    wrong += [f"{name} is not listed" for name in sorted(present.keys() - listed.keys())]
    wrong += [f"{name} has another hash" for name in sorted(listed.keys() & present.keys())
              if sha256(present[name]) != listed[name]]  # fmt: skip
    return Check("files", not wrong, "; ".join(wrong) or f"{len(listed)} files have the hashes listed")


def _check_result(published: Published, report: RobustnessReport) -> Check:
    """Compare the leaderboard's JSON with the evaluation it comes from."""
    info, wrong = published.info, contradictions(report)
    if published.threat_model != report.norm:
        wrong.append(f"threat model {published.threat_model}, evaluated {report.norm}")
    if info.get("eps") is None or abs(parse_fraction(info["eps"]) - report.eps) > 1e-6:
        wrong.append(f"eps {info.get('eps')}, evaluated {report.eps:g}")
    for key, value in (("clean_acc", report.clean_accuracy), ("autoattack_acc", report.robust_accuracy)):
        if info.get(key) is None or abs(float(info[key]) - 100 * value) > 0.0051:
            wrong.append(f"{key} {info.get(key)}, evaluated {100 * value:.2f}")
    if info.get("unreliable", False) == report.reliable:
        wrong.append(f"unreliable {info.get('unreliable', False)}, evaluated {not report.reliable}")
    return Check("result", not wrong, "; ".join(wrong) or "model_info has every key and the evaluation's numbers")


def _in_fresh_process(task: dict[str, Any]) -> dict[str, Any]:
    """Run ``measure`` in a new interpreter, where nothing has been imported or registered yet."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        code = "import sys; from at_extensions.publishing import verification; verification.answer(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(task), str(answer)],
            stderr=None if sys.stderr.isatty() else subprocess.PIPE,  # a terminal shows its progress bars
            text=True,
            check=False,
        )
        if done.returncode or not answer.is_file():
            raise RuntimeError(f"the fresh process failed: {(done.stderr or 'see above').strip()[-2000:]}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    if "refused" in found:
        kind, message = found["refused"]
        raise (FileNotFoundError if kind == "FileNotFoundError" else ValueError)(message)
    return found


def answer(task: str, path: str) -> None:
    """Measure, and write the findings: the task of the fresh process."""
    try:
        found = measure(**json.loads(task))
    except (FileNotFoundError, ValueError) as error:  # of the data, for the caller to correct
        found = {"refused": [type(error).__name__, str(error)]}
    Path(path).write_text(json.dumps(found), encoding="utf-8")


def measure(folder: str, test: dict[str, Any], n_examples: int, seed: int, device: str) -> dict[str, Any]:
    """Load a published model as RobustBench does, and attack it.

    Returns:
        ``total`` test images, those classified rightly ``right``, the ``indices`` attacked and the verdicts ``robust``.
    """
    from at_extensions.data import load_test

    try:
        images = load_test(**test)
    except (FileNotFoundError, ValueError) as error:
        own = ":" in test["name_or_path"] or isinstance(error, ValueError)
        hint = "; say where the test images are: --data folder:PATH or npz:PATH" if own else ""
        raise type(error)(f"{error}{hint}") from error
    published = _import_entry(folder) if runs_code(folder) else register(folder)
    model = load(published).to(device)
    report = RobustnessReport.load(published.folder / "evaluation.json")
    found = evaluate(
        model, images, norm=report.norm, eps=report.eps, version=report.version, seed=seed, shard=False,
        attacks=list(report.after_attack) if report.version == "custom" else None,
        n_examples=min(n_examples, len(images)),
    )  # fmt: skip
    rows = list(range(len(images))) if found.indices is None else found.indices
    right = int(count_correct(model, images)[0])
    return {"total": len(images), "right": right, "indices": rows, "robust": found.robust.tolist()}


def _import_entry(folder: str) -> Published:
    """Let a trusted folder register its model itself; for a fresh process, whose search path it changes."""
    sys.dont_write_bytecode = True  # the folder keeps the files that its checksums list
    sys.path.insert(0, folder)
    import_module("zoo_entry")
    return open_published(folder)


def load(published: Published) -> nn.Module:
    """Return a registered model as RobustBench loads it; of a data set that RobustBench lacks, as timm does."""
    if published.ranked:
        from robustbench.utils import load_model

        return load_model(published.model_id, dataset=published.dataset, threat_model=published.threat_model)
    import timm

    return timm.create_model(published.entry_name, pretrained=True).eval()


def compare(report: RobustnessReport, found: dict[str, Any]) -> list[Check]:
    """Compare the claims of a folder with the findings of ``measure``."""
    return [_compare_clean(report, found), _compare_robust(report, found)]


def _compare_clean(report: RobustnessReport, found: dict[str, Any]) -> Check:
    measured, claimed = found["right"] / found["total"], report.clean_accuracy
    detail = f"{100 * measured:.2f} % of {found['total']:,} images, {100 * claimed:.2f} % claimed"
    if report.n_examples == found["total"]:
        return Check("clean accuracy", abs(measured - claimed) <= CLEAN_TOLERANCE, detail)
    low, high = wilson_interval(int(report.clean.sum()), report.n_examples)
    detail += f" of {report.n_examples:,} (95 % interval {100 * low:.2f} to {100 * high:.2f})"
    return Check("clean accuracy", low <= measured <= high, detail)


def _compare_robust(report: RobustnessReport, found: dict[str, Any]) -> Check:
    robust, rows = torch.tensor(found["robust"]), torch.tensor(found["indices"])
    detail = f"{100 * robust.double().mean():.2f} % of {len(rows):,} images"
    if report.n_examples == found["total"] and report.indices is None:
        claimed = report.robust[rows]
        fell, held = int((claimed & ~robust).sum()), int((~claimed & robust).sum())
        detail += f", {100 * claimed.double().mean():.2f} % claimed of the same; {fell} fell that were claimed robust"
        detail += f", {held} held that were claimed broken"
        return Check("robust accuracy", max(fell, held) <= max(1, FLIPS * len(rows)), detail)
    low, high = wilson_interval(int(robust.sum()), len(rows))
    claimed = report.robust_accuracy
    detail += f" (95 % interval {100 * low:.2f} to {100 * high:.2f}), {100 * claimed:.2f} % claimed"
    return Check("robust accuracy", low <= claimed <= high, detail)
