"""From words to settings: the parsers of all commands, made from the commands' dataclasses."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from at_extensions import settings as s
from at_extensions.cli.commands import COMMANDS, GROUPS, Command
from at_extensions.configuration import Settings, alternatives, as_text, flag, flat_kinds, kinds_of

DESCRIPTION = """Adversarial training: train, evaluate and publish robust image classifiers.

Every command takes --config FILE.yaml with the same names; options on the command line win."""


def parse(words: Sequence[str]) -> tuple[Command, dict[str, Any]]:
    """Return the command and the options that the words give; exits where they are wrong or ask for help."""
    parser, parsers = _parsers()
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    found, unknown = parser.parse_known_args(_spelled(words))
    options = vars(found)
    name = options.pop("command")
    if unknown:
        known = [word for action in parsers[name]._actions for word in action.option_strings]
        options = [word for word in unknown if word.startswith("-")]
        parsers[name].error("; ".join(_unknown(word, known) for word in options or unknown))
    return COMMANDS[name], options


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser, and the parser of each command."""
    parser = _parser("at-extensions", DESCRIPTION, COMMANDS["demo"].example)
    within = {"": parser.add_subparsers(metavar="COMMAND", required=True)}
    parsers = {}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in within:
            outer = within[""].add_parser(group, help=GROUPS[group], **_texts(GROUPS[group], command.example))
            within[group] = outer.add_subparsers(metavar="COMMAND", required=True)
        help = (command.run.__doc__ or "").splitlines()[0]
        parsers[name] = within[group].add_parser(last, help=help, **_texts(command.run.__doc__, command.example))
        parsers[name].usage = f"at-extensions {name} {(command.argument or '').upper()} [options]".replace("  ", " ")
        parsers[name].set_defaults(command=name)
        _add_options(parsers[name], command)
    return parser, parsers


def _parser(prog: str, text: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=prog, **_texts(text, example))


def _texts(text: str | None, example: str) -> dict[str, Any]:
    lines = re.sub(r"(?m)^ +", "", text or "").replace("%", "%%")
    return {
        "description": lines,
        "epilog": f"example:\n  at-extensions {example}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
        "argument_default": argparse.SUPPRESS,
    }


def _add_options(parser: argparse.ArgumentParser, command: Command) -> None:
    if command.argument is not None:
        parser.add_argument(command.argument, nargs="?", help=command.about)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, or the config.yaml of a run.")
    if command.settings is s.TrainSettings:
        parser.add_argument("--preset", metavar="NAME", help="Recipe of a paper: deat or reat.")
    parser.add_argument("--print-config", metavar="", help="Print the settings as YAML, and do nothing else.")
    done: set[str] = set()
    for base in reversed(command.settings.__mro__):
        own = [f for f in fields(base) if f.name not in done] if base not in (object, Settings) else []
        if own and issubclass(base, Settings):
            group = parser.add_argument_group(base.__doc__.splitlines()[0].rstrip(".").lower())
            for f in own:
                _add_option(group, f.name, f, kinds_of(base)[f.name])
            done |= {f.name for f in own}


def _add_option(group: Any, name: str, f: Any, kind: Any) -> None:
    kinds = alternatives(kind)
    default = "" if f.default in (None, MISSING, "") else f" (default: {as_text(f.default)})"
    help = (f.metadata["help"] + default).replace("%", "%%")
    group.add_argument(flag(name), dest=name, metavar=_metavar(kinds), help=help)
    if isinstance(kinds[0], type) and issubclass(kinds[0], Settings):
        for part in fields(kinds[0]):
            _add_option(group, f"{name}.{part.name}", part, kinds_of(kinds[0])[part.name])


def _metavar(kinds: tuple) -> str:
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT", dict: "JSON", s.Paper: "FILE"}
    return "|".join(names.get(kind, "A,B") for kind in kinds if kind is not type(None))


def _spelled(words: Sequence[str]) -> list[str]:
    """Let ``--batch_size`` mean ``--batch-size``, and a switch without a value ``--switch=true``."""
    switches = {"--print-config"}
    for name, command in COMMANDS.items():
        if list(words[: name.count(" ") + 1]) == name.split():
            switches |= {flag(setting) for setting, kind in flat_kinds(command.settings).items() if kind is bool}
    spelled = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if re.match(r"--\w", name) else name
        if name in switches and not equals and following not in ("true", "false"):
            equals, value = "=", "true"
        spelled.append(name + equals + value)
    return spelled


def _unknown(word: str, known: list[str]) -> str:
    from at_extensions.checks import unknown_name

    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    return str(unknown_name("option", word.partition("=")[0], known))
