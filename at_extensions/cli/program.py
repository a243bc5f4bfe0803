"""The command line: it parses settings, runs a command and turns errors into one line each."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from at_extensions import settings as s
from at_extensions.cli.commands import Command
from at_extensions.cli.parsing import parse

EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)
"""Errors that a user's settings, files or machine can cause: shown as one line, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    words, command = list(sys.argv[1:] if argv is None else argv), None
    try:
        command, options = parse(words)
        return _run(command, options) or 0
    except KeyboardInterrupt:
        goes_on = "the same command goes on" if command and command.resumes else "the same command starts anew"
        print(f"\nat-extensions: interrupted; {goes_on}", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("AT_EXTENSIONS_TRACEBACK") or not (isinstance(error, EXPECTED) or _out_of_memory(error)):
            raise
        print(f"at-extensions: error: {_message(error)}", file=sys.stderr)
        return 1


def _run(command: Command, options: dict[str, Any]) -> int | None:
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
    printing = options.pop("print_config", "false") == "true"
    given: dict[str, Any] = {}
    if "preset" in options:
        from at_extensions.presets import preset

        given |= preset(options.pop("preset"))
    if "config" in options:
        given |= s.read_settings(options.pop("config"))
    given |= options
    argument = [] if command.argument is None else [given.pop(command.argument, None)]
    settings = command.settings.from_dict(given)
    if printing:
        import yaml

        print(yaml.safe_dump(settings.to_dict(), sort_keys=False), end="")
        return 0
    if None in argument:
        raise ValueError(f"{command.argument} is missing: {command.about}")
    from at_extensions.memory import keep_freed_memory

    keep_freed_memory()
    return command.run(*argument, settings)


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _message(error: Exception) -> str:
    if _out_of_memory(error):
        return f"out of memory; try a smaller --batch-size ({str(error).splitlines()[0]})"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__
