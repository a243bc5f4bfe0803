"""What a DEAT step costs beside torch.optim.SGD with momentum, and its share of a PGD-10 training step.

python benchmarks/deat_cost.py                   # optimiser steps on a ResNet-18's parameters, seconds
python benchmarks/deat_cost.py --training-step   # also whole PGD-10 steps of a PreActResNet-18, minutes on a CPU
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
from at_extensions.memory import keep_freed_memory
from at_extensions.methods import PGDAT
from at_extensions.optim import DEAT
from measuring import machine, seconds

GOAL = 1.3  # times the step of SGD with momentum
RESULT = Path(__file__).parent / "results" / "deat_cost.json"


def optimizers(weight_decay: float) -> dict[str, Callable[[list], torch.optim.Optimizer]]:
    """Return what is timed; the first is what the others are compared with."""
    sgd = {"lr": 0.01, "momentum": 0.9, "weight_decay": weight_decay}
    deat = {"lr": 0.01, "weight_decay": weight_decay}
    return {
        "sgd_momentum_foreach": lambda params: torch.optim.SGD(params, foreach=True, **sgd),
        "sgd_momentum_default": lambda params: torch.optim.SGD(params, **sgd),
        "deat_foreach": lambda params: DEAT(params, foreach=True, **deat),
        "deat_default": lambda params: DEAT(params, **deat),
        "deat_decoupled": lambda params: DEAT(params, decoupled=True, **deat),
    }


def parameters(device: torch.device, seed: int) -> list[nn.Parameter]:
    """Return the parameters of a ResNet-18, with gradients."""
    torch.manual_seed(seed)
    params = list(create_model("resnet18", 10).to(device).parameters())
    for p in params:
        p.grad = torch.randn_like(p).mul_(0.01)
    return params


def summary(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    low, median, high, fastest = (round(1e3 * t, 3) for t in (low, median, high, min(times)))
    return {"median_ms": median, "quartiles_ms": [low, high], "fastest_ms": fastest}


def optimizer_steps(device: torch.device, weight_decay: float, rounds: int, seed: int) -> dict:
    """Time one step of each optimiser in turn, round by round, each round starting with another one."""
    made = {name: make(parameters(device, seed)) for name, make in optimizers(weight_decay).items()}
    for optimizer in made.values():
        for _ in range(5):
            optimizer.step()
    times: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for r in range(rounds):
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            times[name].append(seconds(made[name].step, device))
    reference = times[names[0]]
    return {
        name: summary(t)
        | {
            "times_sgd_momentum_foreach": round(statistics.median(t) / statistics.median(reference), 3),
            "median_ratio_within_a_round": round(statistics.median(a / b for a, b in zip(t, reference)), 3),
        }
        for name, t in times.items()
    }


def training_step(device: torch.device, batch_size: int, rounds: int, seed: int) -> dict:
    """Time PGD-10 steps of a PreActResNet-18 on random 32 x 32 images: the attack, the gradients, the update."""
    torch.manual_seed(seed)
    model = create_model("preact_resnet18", 10).to(device).train()
    method = PGDAT(model, steps=10)
    optimizer = DEAT(model.parameters(), lr=0.01, weight_decay=5e-4)
    x = torch.rand(batch_size, 3, 32, 32, device=device)
    y = torch.randint(10, (batch_size,), device=device)

    def gradients() -> None:
        optimizer.zero_grad()
        method(x, y).loss.backward()

    times: dict[str, list[float]] = {"gradients": [], "update": []}
    for r in range(rounds + 1):
        both = seconds(gradients, device), seconds(optimizer.step, device)
        if r:  # the first round warms up
            for part, t in zip(times, both):
                times[part].append(t)
    median = {part: statistics.median(t) for part, t in times.items()}
    return {
        "model": "preact_resnet18",
        "batch_size": batch_size,
        "rounds": rounds,
        "attack_forward_backward_ms": round(1e3 * median["gradients"], 3),
        "deat_step_ms": round(1e3 * median["update"], 3),
        "deat_share": round(median["update"] / sum(median.values()), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="steps of each optimiser")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training-step", action="store_true", help="also time whole PGD-10 steps")
    parser.add_argument("--training-rounds", type=int, default=5, help="PGD-10 steps to time")
    parser.add_argument("--batch-size", type=int, default=128, help="images in a PGD-10 step")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    result = {
        "what": "milliseconds of an optimiser step on the parameters of a ResNet-18, interleaved rounds",
        "goal": f"deat_foreach at most {GOAL} times sgd_momentum_foreach",
        "machine": machine(device),
        "seed": args.seed,
        "rounds": args.rounds,
        "parameters": sum(p.numel() for p in parameters(device, args.seed)),
        "weight_decay": {wd: optimizer_steps(device, wd, args.rounds, args.seed) for wd in (0.0, 5e-4)},
    }
    cost = {wd: steps["deat_foreach"]["times_sgd_momentum_foreach"] for wd, steps in result["weight_decay"].items()}
    result["goal_met"] = max(cost.values()) <= GOAL
    if args.training_step:
        result["pgd10_training_step"] = training_step(device, args.batch_size, args.training_rounds, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
