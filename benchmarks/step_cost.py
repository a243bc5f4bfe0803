"""Shared by the benchmarks of methods: whole training steps of several methods, timed in interleaved rounds.

Every method trains a copy of the same network on the same images, as the trainer runs it (folded twin, channels_last).
Methods take turns within a round, each round beginning with another one; ratios are of times within a round. The
reference is timed twice: the ratio of ``pgd_again`` says how far apart equal things are on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from at_extensions import create_model
from at_extensions.data import long_tail_counts
from at_extensions.memory import keep_freed_memory
from at_extensions.methods import Method
from measuring import machine, seconds

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("cifar_resnet18:16", "preact_resnet18")
COUNTS = long_tail_counts(5000, 10, 0.02)
"""Training images of each class; labels are drawn in these proportions."""

Make = Callable[[nn.Module, dict[str, Any]], Method]
"""Makes a method from a model and the options ``eps``, ``alpha`` and ``steps``."""


def training_step(make: Make, network: str, precision: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a whole training step of a method on long-tailed random images: attack, forward, backward, update."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, generator=generator)
    y = torch.multinomial(torch.tensor(COUNTS).double(), args.batch_size, replacement=True, generator=generator)
    index = torch.arange(args.batch_size)
    x, y, index = x.to(device, memory_format=torch.channels_last), y.to(device), index.to(device)
    torch.manual_seed(args.seed)
    name, _, width = network.partition(":")
    model = create_model(name, 10, **({"width": int(width)} if width else {})).to(device).train()
    model.to(memory_format=torch.channels_last)
    method = make(model, {"eps": 8 / 255, "alpha": 2 / 255, "steps": args.steps})
    if args.compile:
        method.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = method(x, y, index).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(
    methods: Mapping[str, Make], references: Mapping[str, str], network: str, precision: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Time every method once a round, after two steps each to warm up.

    Args:
        methods: Name -> maker.
        references: Name -> the method that it is compared with; ``pgd`` where it names none.
        network: Name of ``create_model``; ``NAME:WIDTH`` narrows it.
        precision: ``"fp32"`` or ``"bf16"``.
        args: The program's options.
    """
    steps = {name: training_step(make, network, precision, args) for name, make in methods.items()}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names, clock = list(steps), time.process_time if args.cpu_time else time.perf_counter
    for r in range(args.rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(seconds(steps[name], args.device, clock))
    ratios = {
        name: [a / b for a, b in zip(t, times[references.get(name, "pgd")])]
        for name, t in times.items()
        if name != "pgd"
    }
    return {
        "median_ms": {m: round(1e3 * statistics.median(t), 3) for m, t in times.items()},
        "times_pgd": {m: round(statistics.median(r), 4) for m, r in ratios.items()},
        "times_pgd_quartiles": {m: [round(q, 4) for q in statistics.quantiles(r, n=4)[::2]] for m, r in ratios.items()},
    }


def options(description: str, output: str) -> argparse.Namespace:
    """Parse the options that the programs share, and prepare this process."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="names of create_model; NAME:WIDTH narrows one")
    parser.add_argument("--precisions", nargs="+", default=("fp32", "bf16"), choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="steps of PGD")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU time, on a busy machine")
    parser.add_argument("--compile", action="store_true", help="compile model and twin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help=f"results/{output}_DEVICE.json by default")
    args = parser.parse_args()
    args.output = args.output or RESULTS / f"{output}_{torch.device(args.device).type}.json"
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def measure(
    methods: Mapping[str, Make],
    args: argparse.Namespace,
    *,
    goal: str,
    limit: float,
    judged: Callable[[str], bool],
    references: Mapping[str, str] | None = None,
    note: str = "",
) -> None:
    """Compare the methods on every network and precision, judge the goal, and write and print the result.

    Args:
        methods: Name -> maker.
        args: From ``options``.
        goal: The goal in words.
        limit: Largest ratio that meets it.
        judged: Whether a method is one of those that have to meet it.
        references: As in ``compare``.
        note: A sentence for the reader of the table.
    """
    result = {
        "what": f"a training step with PGD-{args.steps} on {args.batch_size} images of {args.image_size} x "
        f"{args.image_size}, {args.rounds} interleaved rounds" + (", CPU time" if args.cpu_time else ""),
        "goal": goal,
        **({"note": note} if note else {}),
        "machine": machine(torch.device(args.device)),
        "seed": args.seed,
        "compiled": args.compile,
        "networks": {
            n: {p: compare(methods, references or {}, n, p, args) for p in args.precisions} for n in args.networks
        },
    }
    cost = [m["times_pgd"][v] for n in result["networks"].values() for m in n.values() for v in methods if judged(v)]
    result |= {"largest": max(cost), "goal_met": max(cost) <= limit}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
