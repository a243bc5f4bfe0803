"""The command line, ``at-extensions``."""

from at_extensions.cli.commands import COMMANDS, Command
from at_extensions.cli.parsing import parse
from at_extensions.cli.program import main

__all__ = ["COMMANDS", "Command", "main", "parse"]
