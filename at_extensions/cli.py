"""The command line: each command parses, calls one function and prints what came of it."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path

EXPECTED = (ValueError, TypeError, FileNotFoundError, FileExistsError, FloatingPointError)
"""What a user's own settings or files can cause: shown as one line, without a traceback."""


def _commands() -> dict[str, Callable]:
    """Return the commands; what they need loads here, not when the package is imported."""
    from at_extensions import evaluation, experiments, publishing, runs, training

    @wraps(training.train)
    def train(*args, **kwargs):
        run = training.train(*args, **kwargs)
        print(run.metrics()[-1])
        print(f"run: {run.path}  next: at-extensions evaluate {run.path}")

    @wraps(evaluation.evaluate_run)
    def evaluate(run, **kwargs):
        print(evaluation.evaluate_run(run, **kwargs))
        print(f"evaluation: {Path(run) / 'evaluation.json'}  model_info: {publishing.write_run_info(run)}")
        print(f"report: {publishing.write_report([runs.RunDirectory(run)], Path(run) / 'report.html')}")

    @wraps(experiments.demo)
    def demo(*args, **kwargs):
        report = experiments.demo(*args, **kwargs)
        print(f"report: {report}")

    return {"train": train, "evaluate": evaluate, "demo": demo}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 1 for an error that the message explains."""
    import jsonargparse

    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
    arguments = [_underscores(a) for a in (sys.argv[1:] if argv is None else argv)]
    try:
        jsonargparse.auto_cli(
            _commands(),
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
    return 0


def _underscores(argument: str) -> str:
    """Let ``--batch-size`` mean ``--batch_size``."""
    name, equals, value = argument.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if re.match(r"--\w", name) else name) + equals + value


if __name__ == "__main__":
    sys.exit(main())
