"""AutoAttack's standard suite on robust models: stock pyautoattack against ``evaluate``, whole runs, verdicts compared.

python benchmarks/autoattack_speed.py runs/preact/checkpoints/best.safetensors --data npz:cifar10.npz  # hours on a CPU
python benchmarks/autoattack_speed.py A.safetensors B.safetensors --data cifar10 --root data --threads 2
python benchmarks/autoattack_speed.py A.safetensors --data digits --eps 0.2 --n-examples 40 --ways stock fp32  # a trial

Every measurement is a process of its own and they run one after the other. With images that fit into one batch, stock
and ours draw the same random numbers. ``one`` and ``two`` are ``evaluate`` in fp32 in one process and in two, of one
thread each. Times are of the whole call: checks, clean accuracy, attacks and verification. Every way keeps freed memory
(``keep_freed_memory``), as the command ``evaluate`` does; ``stock_script`` is stock without it, as a script runs it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from at_extensions.checks import parse_fraction
from at_extensions.data import load_dataset
from at_extensions.evaluation import evaluate
from at_extensions.memory import keep_freed_memory
from at_extensions.models import load_model
from at_extensions.runs import write_json
from measuring import machine

RESULT = Path(__file__).parent / "results" / "autoattack_speed.json"
WAYS = ("stock", "fp32", "bf16", "one", "two", "stock_script")
SPEEDUPS = {  # name -> (the slower, the faster)
    "fp32 / stock": ("stock", "fp32"),
    "bf16 / stock": ("stock", "bf16"),
    "two processes / one": ("one", "two"),
    "fp32 / stock_script": ("stock_script", "fp32"),
    "bf16 / stock_script": ("stock_script", "bf16"),
}
MARGIN = 0.001  # how much robust accuracy may be above stock


class _Clock(logging.Handler):
    """Reads accuracies and times off pyautoattack's log."""

    def __init__(self):
        super().__init__()
        self.start, self.clean, self.after, self.seconds = time.perf_counter(), 0.0, {}, {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("robust accuracy after "):
            name, rest = message.removeprefix("robust accuracy after ").split(": ", 1)
            now = time.perf_counter()
            self.after[name.lower()] = float(rest.split("%")[0]) / 100
            self.seconds[name.lower()], self.start = now - self.start, now
        elif message.startswith("initial accuracy: "):
            self.start, self.clean = time.perf_counter(), float(message.split(": ")[1].rstrip("%")) / 100


def stock(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> dict:
    """Run pyautoattack as its documentation shows it."""
    from pyautoattack import AutoAttack

    clock, log = _Clock(), logging.getLogger("auto-attack")
    log.setLevel(logging.DEBUG)
    log.addHandler(clock)
    attack = AutoAttack(model, eps=args.eps, norm=args.norm, seed=args.seed, version="standard", device=args.device)
    attack.square.n_queries = args.queries
    _, predictions = attack.run_standard_evaluation(x, y, batch_size=args.batch_size)
    return {"after_attack": clock.after, "attack_seconds": clock.seconds, "robust": (predictions == y).tolist(),
            "clean_accuracy": clock.clean, "flags": []}  # fmt: skip


def ours(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> dict:
    """Run ``evaluate``."""
    from at_extensions.evaluation import autoattack

    apply = autoattack.apply_version

    def with_queries(attackers, version: str, norm: str) -> None:  # for trials; 5,000 is the standard
        apply(attackers, version, norm)
        attackers.square.n_queries = args.queries

    autoattack.apply_version = with_queries
    precision = "bf16" if args.measure == "bf16" else "fp32"
    report = evaluate(
        model, x, y, norm=args.norm, eps=args.eps, seed=args.seed, batch_size=args.batch_size, precision=precision
    )
    return {"after_attack": report.after_attack, "attack_seconds": report.attack_seconds,
            "robust": report.robust.tolist(), "clean_accuracy": report.clean_accuracy,
            "flags": [flag.name for flag in report.flags]}  # fmt: skip


def measure(args: argparse.Namespace) -> None:
    """Measure one way on one model, in this process, and write what came out."""
    torch.set_num_threads(1 if args.measure in ("one", "two") else args.threads)
    if args.measure != "stock_script":
        keep_freed_memory()
    model = load_model(args.models[0]).to(args.device).eval()
    x, y = load_dataset(args.data, root=args.root).test.tensors(args.n_examples)
    start = time.perf_counter()
    outcome = (stock if args.measure.startswith("stock") else ours)(model, x, y, args)
    outcome["seconds"] = time.perf_counter() - start
    if os.environ.get("RANK", "0") == "0":
        write_json(args.out, outcome)


def run(way: str, model: str, args: argparse.Namespace) -> dict:
    """Measure in a process of its own, or in two."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if way == "two" else []
    options = {"--data": args.data, "--root": args.root, "--n-examples": args.n_examples, "--norm": args.norm,
               "--eps": args.eps, "--batch-size": _batch_size(way, args), "--queries": args.queries,
               "--seed": args.seed, "--threads": args.threads, "--device": args.device}  # fmt: skip
    given = [str(part) for option, value in options.items() if value is not None for part in (option, value)]
    threads = 1 if way in ("one", "two") else args.threads
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcome.json"
        command = [sys.executable, *launcher, __file__, model, *given, "--measure", way, "--out", str(out)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        return json.loads(out.read_text())


def _batch_size(way: str, args: argparse.Namespace) -> int:
    """``one`` and ``two`` share batches small enough to be dealt out evenly also when few images stand."""
    return args.shard_batch_size if way in ("one", "two") else args.batch_size


def compare(outcomes: dict[str, dict]) -> dict:
    """Return speedups, and how verdicts differ from stock."""
    found: dict = {"speedups": {}, "against_stock": {}}
    for name, (slower, faster) in SPEEDUPS.items():
        if slower in outcomes and faster in outcomes:
            found["speedups"][name] = outcomes[slower]["seconds"] / outcomes[faster]["seconds"]
    if "stock" in outcomes:
        reference = torch.tensor(outcomes["stock"]["robust"])
        for way, outcome in outcomes.items():
            robust = torch.tensor(outcome["robust"])
            gain = (robust.double().mean() - reference.double().mean()).item()
            found["against_stock"][way] = {
                "verdicts_that_differ": int((robust != reference).sum()),
                "robust_accuracy_gained": gain,
                "within_margin": gain <= MARGIN,
            }
    if "one" in outcomes and "two" in outcomes:
        found["two_equal_one"] = outcomes["one"]["robust"] == outcomes["two"]["robust"]
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="checkpoints that at_extensions.load_model reads")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--root", default=None, help="folder of the data, in torchvision's layout")
    parser.add_argument("--n-examples", type=int, default=200, help="the first so many test images")
    parser.add_argument("--norm", default="Linf")
    parser.add_argument("--eps", type=parse_fraction, default=8 / 255)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--shard-batch-size", type=int, default=16, help="batches of the ways one and two")
    parser.add_argument("--queries", type=int, default=5000, help="of Square; fewer are no standard evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", default=list(WAYS[:-1]), choices=WAYS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.measure:
        measure(args)
        return
    shared = ("data", "n_examples", "norm", "eps", "batch_size", "shard_batch_size", "queries", "seed")
    result = {
        "machine": machine(args.device) | {"threads": args.threads},
        "settings": {name: getattr(args, name) for name in shared},
        "models": {},
    }
    for model in args.models:
        outcomes = {}
        for way in args.ways:
            outcomes[way] = run(way, model, args)
            robust = sum(outcomes[way]["robust"]) / len(outcomes[way]["robust"])
            print(f"{model}  {way:<6} {outcomes[way]['seconds']:9.1f} s   robust {100 * robust:.2f} %", flush=True)
        name = "/".join(Path(model).parts[-3:])
        recipe = load_model(model).recipe
        result["models"][name] = {"recipe": recipe, "ways": outcomes, **compare(outcomes)}
        for speedup, factor in result["models"][name]["speedups"].items():
            print(f"{name}  {speedup}: {factor:.2f} times as fast")
        write_json(args.out, result)


if __name__ == "__main__":
    main()
