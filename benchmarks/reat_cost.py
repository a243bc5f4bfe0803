"""What a REAT step costs beside a PGD-AT step: the same network, attack steps and batch, interleaved rounds.

python benchmarks/reat_cost.py                                   # CIFAR networks; minutes on a CPU
python benchmarks/reat_cost.py --networks small_cnn --batch-size 16 --image-size 8 --steps 1 --rounds 3
python benchmarks/reat_cost.py --device cuda --precisions bf16

Every method trains a copy of the same network on the same images, as the trainer runs it (folded twin, channels_last).
Methods take turns within a round, each round beginning with another one; ratios are of times within a round. PGD-AT is
timed twice: the ratio of ``pgd_again`` says how far apart equal things are on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from at_extensions import create_model
from at_extensions.data import long_tail_counts
from at_extensions.memory import keep_freed_memory
from at_extensions.methods import PGDAT, REAT, BalancedSoftmaxAT, Method
from measuring import machine, seconds

GOAL = 1.03  # times the step of PGD-AT
RESULTS = Path(__file__).parent / "results"
NETWORKS = ("cifar_resnet18:16", "preact_resnet18")
METHODS: dict[str, Callable[[nn.Module, list[int], dict], Method]] = {
    "pgd": lambda model, counts, options: PGDAT(model, **options),
    "pgd_again": lambda model, counts, options: PGDAT(model, **options),
    "at_bsl": lambda model, counts, options: BalancedSoftmaxAT(model, counts, **options),
    "reat_released": lambda model, counts, options: REAT(model, counts, variant="released", **options),
    "reat_pairwise_logit": lambda model, counts, options: REAT(
        model, counts, variant="pairwise", attack_weighting="logit", **options
    ),
}


def training_step(method: str, network: str, precision: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a whole training step of a method on long-tailed random images: attack, forward, backward, update."""
    device, counts = torch.device(args.device), long_tail_counts(5000, 10, 0.02)
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, generator=generator)
    y = torch.multinomial(torch.tensor(counts).double(), args.batch_size, replacement=True, generator=generator)
    x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
    torch.manual_seed(args.seed)
    name, _, width = network.partition(":")
    model = create_model(name, 10, **({"width": int(width)} if width else {})).to(device).train()
    model.to(memory_format=torch.channels_last)
    recipe = METHODS[method](model, counts, {"eps": 8 / 255, "alpha": 2 / 255, "steps": args.steps})
    if args.compile:
        recipe.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = recipe(x, y).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(network: str, precision: str, args: argparse.Namespace) -> dict:
    """Time every method once a round, after two steps each to warm up."""
    steps = {method: training_step(method, network, precision, args) for method in METHODS}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {method: [] for method in steps}
    names = list(steps)
    for r in range(args.rounds):
        for method in names[r % len(names) :] + names[: r % len(names)]:
            times[method].append(seconds(steps[method], torch.device(args.device)))
    ratios = {m: [a / b for a, b in zip(t, times["pgd"])] for m, t in times.items() if m != "pgd"}
    return {
        "median_ms": {m: round(1e3 * statistics.median(t), 3) for m, t in times.items()},
        "times_pgd": {m: round(statistics.median(r), 4) for m, r in ratios.items()},
        "times_pgd_quartiles": {m: [round(q, 4) for q in statistics.quantiles(r, n=4)[::2]] for m, r in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="names of create_model; NAME:WIDTH narrows one")
    parser.add_argument("--precisions", nargs="+", default=("fp32", "bf16"), choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="steps of PGD")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="compile model and twin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="results/reat_cost_DEVICE.json by default")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result = {
        "what": f"a training step with PGD-{args.steps} on {args.batch_size} images of {args.image_size} x "
        f"{args.image_size}, {args.rounds} interleaved rounds",
        "goal": f"REAT at most {GOAL} times PGD-AT",
        "machine": machine(device),
        "seed": args.seed,
        "compiled": args.compile,
        "networks": {n: {p: compare(n, p, args) for p in args.precisions} for n in args.networks},
    }
    cost = [m["times_pgd"][v] for n in result["networks"].values() for m in n.values() for v in METHODS if "reat" in v]
    result |= {"largest": max(cost), "goal_met": max(cost) <= GOAL}
    output = args.output or RESULTS / f"reat_cost_{device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
