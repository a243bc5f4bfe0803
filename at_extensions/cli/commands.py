"""The commands: each calls one function of ``commands`` or ``experiments`` and prints its result."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from at_extensions import settings as s
from at_extensions.configuration import Settings


def train(out: str, settings: s.TrainSettings) -> None:
    """Train a classifier adversarially and keep everything about it in a run directory.

    Started again with the same settings, an interrupted run goes on where it was. Under torchrun the batch is shared
    out over the processes. --preset NAME begins with the recipe of a paper; options beside it win.
    """
    from at_extensions.commands.train import train
    from at_extensions.processes import is_main

    run = train(out, settings)
    if is_main():
        numbers = {k: v for k, v in run.metrics()[-1].items() if isinstance(v, (int, float))}
        print("  ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
        print(f"run: {run.path}\nnext: {shlex.join(['at-extensions', 'evaluate', str(run.path)])}")


def evaluate(run: str, settings: s.EvaluateSettings) -> None:
    """Attack a model with AutoAttack on a test split; write evaluation.json and a report into its run directory.

    The model is that of a run, or a checkpoint of your own: --model, --weights, --data and --eps then make the run.
    Stopped and started again, it goes on where it was. Under torchrun the batches are dealt over the processes.
    """
    from at_extensions.commands.evaluate import evaluate_run, write_results
    from at_extensions.commands.publish import publish_command
    from at_extensions.processes import is_main

    result = evaluate_run(run, settings)
    if is_main():
        info, page = write_results(run)
        print(f"{result}\nmodel_info: {info}\nreport: {page}\nnext: {publish_command(run)}")


def report(folder: str, settings: s.ReportSettings) -> None:
    """Write one HTML page on several runs side by side, with the plots of a sweep where they are one."""
    from at_extensions.commands.report import report_runs

    print(f"report: {report_runs(folder, settings)}")


def publish(run: str, settings: s.PublishSettings) -> None:
    """Write an evaluated run as a folder that is ready to submit to RobustBench."""
    from at_extensions.commands.publish import publish_run, verify_command

    folder = publish_run(run, settings)
    print(f"submission: {folder}\nnext: {verify_command(folder, run)}")


def verify(folder: str, settings: s.VerifySettings) -> int:
    """Check a folder that publish wrote: hashes, schema, clean accuracy, and AutoAttack on some of the images.

    RobustBench's own load_model loads the model in a fresh process. The exit status is 0 if every check passes, else 1.
    """
    from at_extensions.commands.verify import verify_folder

    verification = verify_folder(folder, settings)
    print(verification)
    return 0 if verification.passed else 1


def leaderboard(folder: str, settings: s.LeaderboardSettings) -> None:
    """Write one self-contained HTML page that ranks every model_info JSON under a folder."""
    from at_extensions.commands.leaderboard import rank_results

    print(f"leaderboard: {rank_results(folder, settings)}")


def criticality(settings: s.CriticalitySettings) -> None:
    """Measure layer criticality of trained models on test images; write JSON, CSV and pictures."""
    from at_extensions.commands.analyze import analyze_criticality

    for name, result in analyze_criticality(settings).items():
        print(f"{name}\n{result}\n")
    print(f"results: {', '.join(str(path) for path in sorted(Path(settings.out).glob('criticality*')))}")


def dispersion(settings: s.DispersionSettings) -> None:
    """Measure how far PGD's end points spread over its random starts (local dispersion); write JSON."""
    from at_extensions.commands.analyze import analyze_dispersion

    for name, result in analyze_dispersion(settings).items():
        print(f"{name}\n{result}\n")
    print(f"results: {Path(settings.out) / 'dispersion.json'}")


def instability(settings: s.InstabilitySettings) -> None:
    """Measure how much the training gradient changes along a step, and the attack's share; write JSON and a picture."""
    from at_extensions.commands.analyze import analyze_instability

    for name, result in analyze_instability(settings).items():
        print(f"{name}\n{result}\n")
    print(f"results: {Path(settings.out) / 'instability.json'}, {Path(settings.out) / 'instability.png'}")


def ntk(settings: s.NTKSettings) -> None:
    """Measure the empirical neural tangent kernel of trained models, over kept epochs; write JSON, NPZ and pictures.

    Of a run that was trained with --keep-every, the kernel of each kept epoch: distances, effective rank, alignment.
    """
    from at_extensions.commands.analyze import analyze_ntk

    for name, result in analyze_ntk(settings).items():
        print(f"{name}\n{result}\n")
    print(f"results: {', '.join(str(path) for path in sorted(Path(settings.out).glob('*.*')))}")


def random_labels(settings: s.RandomLabelsSettings) -> int:
    """Train on random labels by several methods, and measure what they memorise; write JSON and pictures.

    Accuracy on right and on wrong training labels, clean and under PGD, and the instability of the training gradient
    with the attack's share. Run again, it goes on where it stopped; several processes may share a folder.
    """
    from at_extensions.experiments.random_labels import random_labels

    progress = random_labels(settings.out, settings)
    found = [Path(settings.out) / name for name in ("summary.json", "memorisation.png", "instability.png")]
    print(f"{progress}\nresults: {', '.join(str(path) for path in found if path.exists())}")
    return 1 if progress.failed else 0


def induced_distribution(run: str, settings: s.InducedDistributionSettings) -> None:
    """Train new networks on the adversarial examples of a run's kept epochs, with a held-out control; write JSON.

    The run must have been trained with --keep-every, and with --train-size on a part of the data. Each finished epoch
    is one file; run again, it goes on where it stopped.
    """
    from at_extensions.experiments import induced_distribution

    out = Path(run) / "induced_distribution" if settings.out is None else Path(settings.out)
    print(induced_distribution(run, out, settings))
    print(f"results: {', '.join(str(path) for path in sorted(out.glob('induced_distribution.*')))}")
    print(f"next: {shlex.join(['at-extensions', 'report', str(run)])}")


def demo(settings: s.DemoSettings) -> None:
    """Train a small CNN on scanned digits with and without PGD-AT, attack both with AutoAttack, and report.

    Takes minutes on two CPU cores. Run again, it goes on where it stopped.
    """
    from at_extensions.experiments.demo import demo

    print(f"report: {demo(settings)}")


def feature_injection(out: str, settings: s.InjectionSettings) -> int:
    """Inject features of the classes into all images, and see where training overfits catastrophically.

    Ortiz-Jimenez et al. (2023): a grid of amplitudes, radii and methods over seeds, with a control. The folder gets a
    JSON file a run, the rates with intervals, a map and curves. Run again, it goes on where it stopped.
    """
    from at_extensions.experiments.feature_injection import feature_injection

    result = feature_injection(out, settings)
    print(f"{result}\nresults: {', '.join(str(path) for path in result.files)}")
    return 1 if result.progress.failed else 0


@dataclass(frozen=True)
class Command:
    """One command: its function, its settings and, for ``--help``, its argument and an example."""

    run: Callable[..., int | None]
    settings: type[Settings]
    example: str
    argument: str | None = None
    about: str = ""
    resumes: bool = False


COMMANDS = {
    "train": Command(
        train,
        s.TrainSettings,
        "train runs/digits --data digits --method pgd --eps 0.2 --steps 3 --epochs 5 --augment crop",
        "out",
        "The run directory.",
        resumes=True,
    ),
    "evaluate": Command(
        evaluate,
        s.EvaluateSettings,
        "evaluate runs/digits --n-examples 50",
        "run",
        "A run directory, or the one to make.",
        resumes=True,
    ),
    "report": Command(
        report, s.ReportSettings, "report runs", "folder", "A folder of run directories, or one run directory."
    ),
    "publish": Command(
        publish,
        s.PublishSettings,
        'publish runs/digits --id Doe2026Digits --paper.title "Robust digits" --paper.authors "Jane Doe" '
        "--paper.link https://example.org --allow-partial",
        "run",
        "A run with weights and an evaluation.",
    ),
    "verify": Command(
        verify, s.VerifySettings, "verify Doe2026Digits --n-examples 20", "folder", "A folder that publish wrote."
    ),
    "leaderboard": Command(
        leaderboard, s.LeaderboardSettings, "leaderboard runs", "folder", "Any folder with model_info JSON files."
    ),
    "analyze criticality": Command(
        criticality, s.CriticalitySettings, "analyze criticality --model runs/digits --data digits --n-examples 50"
    ),
    "analyze dispersion": Command(
        dispersion,
        s.DispersionSettings,
        "analyze dispersion --model runs/digits --data digits --n-examples 9 --eps 0.2",
    ),
    "analyze instability": Command(
        instability, s.InstabilitySettings, "analyze instability --model runs/digits --data digits --eps 0.2"
    ),
    "experiment feature-injection": Command(
        feature_injection,
        s.InjectionSettings,
        "experiment feature-injection runs/injection --data digits --eps 0.1 --betas 0,0.1 --seeds 0 --epochs 2 "
        "--train-size 300 --test-size 50 --val-steps 2",
        "out",
        "The folder of results.",
        resumes=True,
    ),
    "analyze ntk": Command(
        ntk, s.NTKSettings, "analyze ntk --model runs/half --data digits --n-examples 40 --out runs/ntk"
    ),
    "experiment random-labels": Command(
        random_labels,
        s.RandomLabelsSettings,
        "experiment random-labels --data digits --methods pgd,trades --rates 0,1 --seeds 0 --eps 0.2 --epochs 1 "
        "--train-size 60",
        resumes=True,
    ),
    "experiment induced-distribution": Command(
        induced_distribution,
        s.InducedDistributionSettings,
        "experiment induced-distribution runs/half --images 100 --net-epochs 2 --probe 10",
        "run",
        "A run directory with kept epochs.",
        resumes=True,
    ),
    "demo": Command(demo, s.DemoSettings, "demo --out runs/demo --epochs 2", resumes=True),
}
GROUPS = {
    "analyze": "Measure a trained model.",
    "experiment": "Train models to learn something about training.",
}
