"""The command line: each command parses its settings, calls one function of ``commands`` and prints the result."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from at_extensions import settings as s
from at_extensions.configuration import Settings, alternatives, as_text, flag, flat_kinds, kinds_of

EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)
"""Errors that a user's settings, files or machine can cause: shown as one line, without a traceback."""

DESCRIPTION = """Adversarial training: train, evaluate and publish robust image classifiers.

Every command takes --config FILE.yaml with the same names; options on the command line win."""


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


def demo(settings: s.DemoSettings) -> None:
    """Train a small CNN on scanned digits with and without PGD-AT, attack both with AutoAttack, and report.

    Takes minutes on two CPU cores. Run again, it goes on where it stopped.
    """
    from at_extensions.experiments.demo import demo

    print(f"report: {demo(settings)}")


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
    "demo": Command(demo, s.DemoSettings, "demo --out runs/demo --epochs 2", resumes=True),
}
GROUPS = {"analyze": "Measure a trained model."}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    words, command = list(sys.argv[1:] if argv is None else argv), None
    try:
        command, options = _parse(words)
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


def _parse(words: Sequence[str]) -> tuple[Command, dict[str, Any]]:
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


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _message(error: Exception) -> str:
    if _out_of_memory(error):
        return f"out of memory; try a smaller --batch-size ({str(error).splitlines()[0]})"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
