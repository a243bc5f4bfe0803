"""The command line: each command parses, calls one function and prints what came of it."""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from at_extensions.runs import RunDirectory

EXPECTED = (ValueError, TypeError, FileNotFoundError, FileExistsError, FloatingPointError)
"""What a user's own settings or files can cause: shown as one line, without a traceback."""


def _commands() -> dict[str, Callable]:
    """Return the commands; what they need loads here, not when the package is imported."""
    from at_extensions import evaluation, experiments, publishing, training

    @wraps(training.train)
    def train(*args, **kwargs):
        run = training.train(*args, **kwargs)
        numbers = ((k, v) for k, v in run.metrics()[-1].items() if isinstance(v, (int, float)))
        print("  ".join(f"{key} {value:.4g}" for key, value in numbers))
        print(f"run: {run.path}\nnext: at-extensions evaluate {run.path}")

    @wraps(evaluation.evaluate_run)
    def evaluate(run, **kwargs):
        print(evaluation.evaluate_run(run, **kwargs))
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
            dataset: RobustBench's name of the data set; the run's own name for it by default.
            architecture: Name of the network as people write it; made from the model's name by default.
            allow_partial: Write a result that RobustBench would not rank, marked as such.
            allow_other_eps: Publish an evaluation at another radius than the run trained for.
        """
        choices = {"dataset": dataset, "architecture": architecture}
        allowed = {"allow_partial": allow_partial, "allow_other_eps": allow_other_eps}
        folder = publishing.publish(run_dir, paper, id, out or id, **choices, **allowed)
        print(f"submission: {folder}\nnext: at-extensions verify {folder}")

    publish.__annotations__["paper"] = publishing.Paper  # a name of this function, unknown where the parser looks
    return {
        "train": train,
        "evaluate": evaluate,
        "publish": publish,
        "verify": verify,
        "leaderboard": leaderboard,
        "demo": demo,
    }


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 1 for an error that the message explains."""
    import jsonargparse

    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
    commands = _commands()
    arguments = _flags([_underscores(a) for a in (sys.argv[1:] if argv is None else argv)], commands)
    try:
        status = jsonargparse.auto_cli(
            commands,
            args=arguments,
            prog="at-extensions",
            description="Adversarial training: train, evaluate and publish robust image classifiers. "
            "Every command takes --config FILE.yaml with the same names; what is given on the command line wins.",
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


def _flags(arguments: list[str], commands: dict[str, Callable]) -> list[str]:
    """Let ``--allow_partial`` mean ``--allow_partial=true``, for every option that is true or false."""
    switches = {
        f"--{name}"
        for command in commands.values()
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.annotation in (bool, "bool")
    }
    following = [*arguments[1:], "--"]
    return [
        f"{a}=true" if a in switches and after not in ("true", "false") else a
        for a, after in zip(arguments, following, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
