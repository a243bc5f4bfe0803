"""A finished run as a folder for RobustBench and timm: weights, result, model card, checksums."""

from __future__ import annotations

import hashlib
import html
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from at_extensions.checks import parse_fraction
from at_extensions.evaluation import RobustnessReport, state_digest
from at_extensions.named_models import open_run
from at_extensions.publishing import naming
from at_extensions.publishing.model_info import Paper, eps_fraction, model_info, write_model_info
from at_extensions.publishing.naming import TEST_IMAGES
from at_extensions.publishing.pages import compact_yaml, render
from at_extensions.publishing.standalone import Sources, sources
from at_extensions.publishing.zoo import (
    THREAT_MODELS,
    check_dataset,
    check_id,
    entry_name,
    image_config,
    is_ranked,
)
from at_extensions.runs import OWN_CHECKPOINT, RunDirectory, load_tensors, read_recipe, save_weights

CHECKSUMS = "SHA256SUMS"
_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
_STRIPPED = ("module.", "model.")  # RobustBench's loader cuts these out of names, wherever they occur


@dataclass(frozen=True)
class _Submission:
    """Everything the folder is made from."""

    folder_name: str
    model_id: str
    dataset: str
    architecture: str
    paper: Paper
    report: RobustnessReport
    recipe: Mapping[str, Any]
    config: Mapping[str, Any]
    history: list[dict]
    model: nn.Module
    weights: Path
    shortcomings: list[str]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    @property
    def threat_model(self) -> str:
        return self.report.norm

    @property
    def entry_name(self) -> str:
        return entry_name(self.model_id, self.dataset, self.threat_model)

    @property
    def module(self) -> str:
        return self.model_id.lower().replace("-", "_")

    @property
    def eps(self) -> str:
        return eps_fraction(self.report.eps, self.report.norm)

    @property
    def image_config(self) -> dict[str, Any] | None:
        """How RobustBench must read ImageNet's images; other data sets' come as they are."""
        size = (self.config.get("data") or {}).get("image_size") or 224
        return image_config(size) if self.dataset == "imagenet" else None

    @property
    def ranked(self) -> bool:
        return is_ranked(self.dataset, self.threat_model)

    @property
    def images(self) -> str:
        return naming.images_in_words(self.recipe["in_chans"])

    @property
    def venue(self) -> str:
        return naming.venue(self.paper.venue, self.paper.link)

    @property
    def method(self) -> str:
        """The training method, where it is on record."""
        name = (self.config.get("method") or {}).get("name")
        return "" if name in (None, OWN_CHECKPOINT) else name

    @property
    def own_code(self) -> bool:
        """Whether the network is a user's code, which the folder ships."""
        return "factory" in self.recipe

    @property
    def stripped_names(self) -> bool:
        """Whether RobustBench's own loader would misread the names of the weights."""
        return any(part in name for name in self.tensors for part in _STRIPPED)

    @property
    def settings(self) -> str:
        """The run's configuration as YAML, without the folders of the machine it ran on."""
        return compact_yaml({key: value for key, value in public_config(self.config).items() if key != "versions"})


def publish(
    run_dir: str | Path | RunDirectory,
    paper: Paper,
    model_id: str,
    out: str | Path,
    *,
    dataset: str | None = None,
    architecture: str | None = None,
    allow_partial: bool = False,
    allow_other_eps: bool = False,
) -> Path:
    """Write an evaluated run as a folder that is ready to submit to RobustBench.

    The folder holds the weights as ``<id>.pt`` and ``<id>.safetensors``, ``model_info/<dataset>/<threat>/<id>.json``,
    ``new_model_issue.md`` for RobustBench's tracker, ``model_zoo/`` for a pull request, ``zoo_entry.py``, which makes
    the model loadable by RobustBench, AutoAttack's log and verdicts, the run's configuration, ``README.md`` and
    ``SHA256SUMS``. Nothing of it names a folder of this machine.

    Args:
        run_dir: A run with weights and an ``evaluation.json``.
        paper: The paper of the result.
        model_id: First author, year, first word of the title and an optional variant, such as
            ``"Wang2023Better_WRN-28-10"``.
        out: The folder to write; must not exist or be empty.
        dataset: RobustBench's name of the data set, or a free name of an own one; the run's name for it if None, which
            is that of the file for npz:PATH and folder:PATH.
        architecture: Printed name of the network; made from its name and options if None.
        allow_partial: Write a result that RobustBench would not rank (fewer test images than it asks for, another
            version of AutoAttack, a data set or threat model it has no leaderboard for), marked as such.
        allow_other_eps: Publish an evaluation at another radius than the run trained for.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``out`` holds something.
        FileNotFoundError: The run has no weights or no evaluation.
        ValueError: A name that RobustBench or timm would not take, an evaluation that is damaged, older than the
            weights, at another radius or not to be ranked, a network that cannot be shipped.
    """
    run = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory(run_dir)
    check_id(model_id)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; choose another or delete it")
    submission = _read(run, paper, model_id, dataset, architecture, out.name)
    if submission.shortcomings and not allow_partial:
        free = "" if dataset or submission.dataset in TEST_IMAGES else (
            f" The data set is called {submission.dataset} here; the name of an own one is free (--dataset NAME)."
        )  # fmt: skip
        raise ValueError(
            f"RobustBench would not rank this result: {'; '.join(submission.shortcomings)}.{free} To publish it all "
            "the same, marked as such, pass allow_partial (--allow-partial)"
        )
    _check_eps(submission, allow_other_eps)
    _check_new(submission)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(submission, partial)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _read(
    run: RunDirectory, paper: Paper, model_id: str, dataset: str | None, architecture: str | None, folder_name: str
) -> _Submission:
    weights, evaluation, config = run.published_weights(), run.path / "evaluation.json", run.config()
    if not evaluation.is_file():
        raise FileNotFoundError(f"{run.path} has no evaluation.json; run: at-extensions evaluate {run.path}")
    if weights.stat().st_mtime_ns > evaluation.stat().st_mtime_ns:
        raise ValueError(f"{evaluation} is older than {weights}; evaluate the run again")
    report = RobustnessReport.load(evaluation)
    model, recipe = open_run(run).model, _recipe(weights, config)
    if report.weights not in (None, state_digest(model)):
        raise ValueError(f"{evaluation} is about other weights than {weights}; evaluate the run again")
    data = config.get("data") or {}
    own = naming.data_name(data)
    if report.data_name not in (None, own):
        raise ValueError(f"{evaluation} is about {report.data_name}, not {own}; evaluate the run on its own data")
    if wrong := contradictions(report):
        raise ValueError(f"{evaluation} contradicts itself: {'; '.join(wrong)}; evaluate the run again")
    if dataset is None and not data.get("name"):
        raise ValueError("config.yaml names no data set; say which one it is: dataset='cifar10' (--dataset)")
    dataset = check_dataset(dataset or naming.dataset_name(data["name"]))
    classes = _CLASSES.get(dataset, report.num_classes)
    if recipe["num_classes"] != classes or report.num_classes != classes:
        raise ValueError(f"{dataset} has {classes} classes, the model {recipe['num_classes']}")
    return _Submission(
        folder_name, model_id, dataset, architecture or naming.architecture_name(recipe), paper, report, recipe, config,
        run.metrics(), model, weights, shortcomings(report, dataset),
    )  # fmt: skip


def _recipe(weights: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the record that the network is made from: a factory's, or the recipe beside the weights."""
    record = config.get("model") or {}
    if "factory" in record:
        return record
    recipe = read_recipe(weights)
    if recipe is None:
        raise ValueError(f"{weights} names no recipe; publish models that create_model or a factory made")
    return recipe


def shortcomings(report: RobustnessReport, dataset: str) -> list[str]:
    """Return why RobustBench would not rank an evaluation; empty if it would."""
    found = []
    if dataset not in TEST_IMAGES:
        found.append(f"RobustBench has no leaderboard of {dataset}")
    elif report.n_examples < TEST_IMAGES[dataset]:
        found.append(f"only {report.n_examples:,} of {TEST_IMAGES[dataset]:,} test images were attacked")
    if dataset == "imagenet" and report.indices is not None:
        found.append("RobustBench's ImageNet leaderboard has 5,000 images of its own, and these were drawn at random")
    if report.norm not in THREAT_MODELS:
        found.append(f"RobustBench has no leaderboard of {report.norm}")
    if report.version != "standard":
        found.append(f"AutoAttack's version was {report.version}, not standard")
    if report.precision != "fp32":
        found.append(f"adversarial examples were searched in {report.precision}, not fp32")
    return found


def contradictions(report: RobustnessReport) -> list[str]:
    """Return where a report's accuracies are not those of its verdicts."""
    found = []
    pairs = (("clean", report.clean, report.clean_accuracy), ("robust", report.robust, report.robust_accuracy))
    for name, verdicts, accuracy in pairs:
        if len(verdicts) != report.n_examples:
            found.append(f"{len(verdicts)} {name} verdicts for {report.n_examples} images")
        elif abs(verdicts.double().mean().item() - accuracy) > 1e-9:
            found.append(f"{name} accuracy {accuracy:.4f}, {verdicts.double().mean().item():.4f} by its verdicts")
    return found


def _check_eps(submission: _Submission, allow_other: bool) -> None:
    method, evaluated = submission.config.get("method") or {}, submission.report.eps
    trained = method.get("eps")
    if method.get("name") == OWN_CHECKPOINT:  # its training is not on record
        return
    if allow_other or (trained is not None and math.isclose(parse_fraction(trained), evaluated, rel_tol=1e-6)):
        return
    known = "names no radius of training" if trained is None else f"says {trained} for training"
    raise ValueError(
        f"the evaluation is at eps {submission.eps}, but config.yaml {known}; evaluate again, or pass allow_other_eps "
        "(--allow-other-eps)"
    )


def _check_new(submission: _Submission) -> None:
    """Refuse an id that RobustBench's zoo has, or whose name in timm is the same."""
    from robustbench.model_zoo import model_dicts

    for dataset, boards in model_dicts.items():
        for threat_model, entries in boards.items():
            if (dataset.value, threat_model.value) == (submission.dataset, submission.threat_model):
                taken = {name.lower().replace("-", "_"): name for name in entries}
                if submission.module in taken:
                    raise ValueError(f"RobustBench has {taken[submission.module]} already; add a variant to the id")


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration without the folders that data lay in."""
    public = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    data = public.get("data")
    if isinstance(data, dict):
        data.pop("root", None)
        data["name"] = naming.without_folder(str(data.get("name")))
    return public


def _write(submission: _Submission, folder: Path) -> None:
    """Fill the folder; the checksums come last."""
    code = sources(
        submission.recipe,
        submission.model_id,
        submission.dataset,
        submission.threat_model,
        submission.entry_name,
        submission.image_config,
        model=submission.model,
        run=submission.weights.parent.parent,
    )
    _write_weights(submission, folder)
    _write_result(submission, folder)
    architectures = "model_zoo/architectures"
    texts = {
        "config.yaml": compact_yaml(public_config(submission.config)),
        "autoattack.log": render("autoattack.log", report=submission.report),
        "zoo_entry.py": code.zoo_entry,
        f"{architectures}/{submission.module}.py": code.architecture,
        "new_model_issue.md": _page("new_model_issue.md", submission, code),
        "README.md": _page("README.md", submission, code),
    }
    if code.network is not None:
        texts |= {f"{place}{code.network_module}.py": code.network for place in ("", f"{architectures}/")}
    if submission.ranked:
        texts["model_zoo/entry.txt"] = render("model_zoo_entry.txt", it=submission, code=code)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / CHECKSUMS).write_text(checksums(folder), encoding="utf-8")


def _write_weights(submission: _Submission, folder: Path) -> None:
    tensors, target = submission.tensors, folder / f"{submission.model_id}.safetensors"
    if tensors.keys() == load_tensors(submission.weights)[0].keys():
        shutil.copyfile(submission.weights, target)
    else:  # names of a compiled or wrapped model
        save_weights(submission.model, target)
    torch.save({"state_dict": dict(tensors)}, folder / f"{submission.model_id}.pt")


def _write_result(submission: _Submission, folder: Path) -> None:
    marks = [submission.paper.footnote] if submission.paper.footnote else []
    if submission.shortcomings:
        marks.append(f"Not comparable with the leaderboard: {'; '.join(submission.shortcomings)}.")
    info = model_info(
        submission.report,
        submission.paper,
        dataset=submission.dataset,
        architecture=submission.architecture,
        footnote=" ".join(marks),
    )
    write_model_info(info, folder / "model_info", submission.model_id, submission.threat_model)
    name = submission.report.data_name
    report = replace(submission.report, data_name=None if name is None else naming.without_folder(name))
    report.save(folder / "evaluation.json")


def _page(template: str, submission: _Submission, code: Sources) -> str:
    """Return a Markdown page; the paper's fields keep to one line each, and none of them is markup."""
    fields = {name: getattr(submission.paper, name) for name in ("title", "authors", "link", "code", "license")}
    fields["venue"] = submission.venue
    paper = {name: html.escape(" ".join(str(text).split()), quote=False) for name, text in fields.items()}
    best = max(submission.history, key=lambda row: row.get("val_robust_accuracy") or 0.0, default=None)
    return render(template, it=submission, paper=paper, report=submission.report, best=best, code=code)


def checksums(folder: Path) -> str:
    """Return SHA-256 of every file under ``folder``, as ``sha256sum`` writes and checks them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / CHECKSUMS)
    return "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
