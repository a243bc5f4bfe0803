"""The command line: each command parses, calls one function and prints what came of it."""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

from at_extensions.memory import keep_freed_memory
from at_extensions.processes import is_main
from at_extensions.runs import RunDirectory, find_runs

EXPECTED = (ValueError, TypeError, FileNotFoundError, FileExistsError, FloatingPointError)
"""What a user's own settings or files can cause: shown as one line, without a traceback."""


def _commands() -> dict[str, Callable | dict]:
    """Return the commands; what they need loads here, not when the package is imported."""
    from at_extensions import experiments, publishing
    from at_extensions.commands.evaluate import evaluate_run
    from at_extensions.commands.train import train as train_run

    @wraps(train_run)
    def train(*args, **kwargs):
        run = train_run(*args, **kwargs)
        if not is_main():
            return
        numbers = ((k, v) for k, v in run.metrics()[-1].items() if isinstance(v, (int, float)))
        print("  ".join(f"{key} {value:.4g}" for key, value in numbers))
        print(f"run: {run.path}\nnext: at-extensions evaluate {run.path}")

    @wraps(evaluate_run)
    def evaluate(run, **kwargs):
        result = evaluate_run(run, **kwargs)
        if not is_main():
            return
        print(result)
        print(f"model_info: {publishing.write_run_info(run)}")
        print(f"report: {publishing.write_report([RunDirectory(run)], Path(run) / 'report.html')}")

    @wraps(experiments.demo)
    def demo(*args, **kwargs):
        print(f"report: {experiments.demo(*args, **kwargs)}")

    @wraps(publishing.leaderboard)
    def leaderboard(*args, **kwargs):
        print(f"leaderboard: {publishing.leaderboard(*args, **kwargs)}")

    @wraps(publishing.verify)
    def verify(*args, **kwargs):
        verification = publishing.verify(*args, **kwargs)
        print(verification)
        return 0 if verification.passed else 1

    def publish(
        run_dir: str,
        *,
        id: str,
        paper: publishing.Paper,
        out: str | None = None,
        dataset: str | None = None,
        architecture: str | None = None,
        allow_partial: bool = False,
        allow_other_eps: bool = False,
    ):
        """Write an evaluated run as a folder that is ready to submit to RobustBench.

        Args:
            run_dir: A run with weights and an evaluation.
            id: First author, year, first word of the title, variant, such as Wang2023Better_WRN-28-10.
            paper: What the result belongs to; a YAML file, or --paper.title, --paper.authors, --paper.link, ...
            out: The folder to write, new or empty; named after the id by default.
            dataset: RobustBench's name of the data set, or a free name of your own; the run's name for it by default.
            architecture: Printed name of the network; made from its name and options by default.
            allow_partial: Write a result that RobustBench would not rank, marked as such.
            allow_other_eps: Publish an evaluation at another radius than the run trained for.
        """
        choices = {"dataset": dataset, "architecture": architecture}
        allowed = {"allow_partial": allow_partial, "allow_other_eps": allow_other_eps}
        folder = publishing.publish(run_dir, paper, id, out or id, **choices, **allowed)
        print(f"submission: {folder}\nnext: {publishing.verify_command(folder, RunDirectory(run_dir).config())}")

    publish.__annotations__["paper"] = publishing.Paper  # a name of this function, unknown where the parser looks

    def report(folder: str, *, out: str | None = None, title: str = "Robustness report"):
        """Write one HTML page on several runs side by side, with the plots of a sweep where they are one.

        Args:
            folder: A folder of run directories, or one run directory.
            out: The file to write; report.html in the folder by default.
            title: Heading of the page.
        """
        runs = find_runs(folder)
        print(f"report: {publishing.write_report(runs, out or Path(folder) / 'report.html', title=title)}")

    @wraps(publishing.analyze_criticality)
    def criticality(*, out: str = "runs/criticality", **kwargs):
        for name, result in publishing.analyze_criticality(out=out, **kwargs).items():
            print(f"{name}\n{result}\n")
        print(f"results: {', '.join(str(path) for path in sorted(Path(out).glob('criticality*')))}")

    return {
        "train": train,
        "evaluate": evaluate,
        "report": report,
        "publish": publish,
        "verify": verify,
        "leaderboard": leaderboard,
        "analyze": {"_help": "Measure what a trained model does.", "criticality": criticality},
        "demo": demo,
    }


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 1 for an error that the message explains."""
    import jsonargparse

    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
    commands = _commands()
    keep_freed_memory()
    arguments = _flags([_underscores(a) for a in (sys.argv[1:] if argv is None else argv)], commands)
    try:
        arguments = _preset_first(arguments)
        status = jsonargparse.auto_cli(
            commands,
            args=arguments,
            prog="at-extensions",
            description="Adversarial training: train, evaluate and publish robust image classifiers. "
            "Every command takes --config FILE.yaml with the same names; what is given on the command line wins. "
            "train --preset NAME begins with the recipe of a paper.",
        )
    except EXPECTED as error:
        if os.environ.get("AT_EXTENSIONS_TRACEBACK"):
            raise
        print(f"at-extensions: error: {error}", file=sys.stderr)
        return 1
    return status or 0


def _underscores(argument: str) -> str:
    """Let ``--batch-size`` mean ``--batch_size``."""
    name, equals, value = argument.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if re.match(r"--\w", name) else name) + equals + value


def _preset_first(arguments: list[str]) -> list[str]:
    """Let ``train ... --preset deat`` mean ``train --config THE_PRESET.yaml ...``: whatever else is given then wins."""
    from at_extensions.training.presets import preset_path

    if arguments[:1] != ["train"]:
        return arguments
    rest = arguments[1:]
    for i, argument in enumerate(rest):
        option, equals, name = argument.partition("=")
        if option == "--preset":
            name, after = (name, i + 1) if equals else (next(iter(rest[i + 1 : i + 2]), ""), i + 2)
            return ["train", "--config", str(preset_path(name)), *rest[:i], *rest[after:]]
    return arguments


def _flags(arguments: list[str], commands: dict[str, Callable | dict]) -> list[str]:
    """Let ``--allow_partial`` mean ``--allow_partial=true``, for every option that is true or false."""
    switches = {
        f"--{name}"
        for command in _functions(commands)
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.annotation in (bool, "bool")
    }
    following = [*arguments[1:], "--"]
    return [
        f"{a}=true" if a in switches and after not in ("true", "false") else a
        for a, after in zip(arguments, following, strict=True)
    ]


def _functions(commands: dict[str, Callable | dict]) -> Iterator[Callable]:
    """Every command, and every command of a group."""
    for command in commands.values():
        if isinstance(command, dict):
            yield from _functions({name: part for name, part in command.items() if name != "_help"})
        else:
            yield command


if __name__ == "__main__":
    sys.exit(main())
