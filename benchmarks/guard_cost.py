"""The cost of the guard against catastrophic overfitting where it raises no alarm: epochs of FGSM with and without it.

python benchmarks/guard_cost.py                                  # CIFAR networks; minutes on a CPU
python benchmarks/guard_cost.py --networks small_cnn --batch-size 16 --image-size 8 --window 4 --rounds 3
python benchmarks/guard_cost.py --device cuda --precisions bf16 --batch-size 128

Trainers of copies of one network take turns, an epoch of one window each, each round beginning with another one; ratios
are of times within a round. The unguarded training is timed twice: the ratio of ``plain_again`` says how far apart
equal things are on this machine. The guard rolls back, so that its copies of the state count; it reads its counts and
takes a copy once an epoch here, and a copy of the epoch's beginning more, which a real epoch of several windows takes
once. The learning rate is next to 0, so that no alarm can change the work; an alarm is an error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from at_extensions import create_model
from at_extensions.memory import keep_freed_memory
from at_extensions.methods import FGSMAT
from at_extensions.training import CollapseGuard, Trainer
from measuring import machine, seconds

GOAL = 1.01  # times the training without the guard
RESULTS = Path(__file__).parent / "results"
NETWORKS = ("cifar_resnet18:16", "preact_resnet18")
WAYS = ("plain", "plain_again", "warn", "rollback")


def epoch_of(way: str, network: str, precision: str, args: argparse.Namespace):
    """Return a function that trains one more epoch of ``window`` steps on random images."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    batches = [(torch.rand(shape, generator=generator), torch.randint(10, shape[:1], generator=generator))
               for _ in range(args.window)]  # fmt: skip
    torch.manual_seed(args.seed)
    name, _, width = network.partition(":")
    model = create_model(name, 10, **({"width": int(width)} if width else {})).to(args.device)
    guards = []
    if way in ("warn", "rollback"):  # validation accuracy of a few random images is noise: it raises no alarm
        guards = [CollapseGuard(*batches[0], action=way, window=args.window, fall=1e-9, seed=args.seed)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12, momentum=0.9)
    method = FGSMAT(model, eps=8 / 255, variant="rs", seed=args.seed)
    trainer = Trainer(method, optimizer, epochs=1, precision=precision, observers=guards, progress=False)
    validation = [(batches[0][0][:8], batches[0][1][:8])]

    def epoch() -> None:
        trainer.fit(batches, validation)
        trainer.epochs += 1
        if guards and guards[0].verdict is not None:
            raise RuntimeError("the guard raised an alarm, so that its cost without one was not measured")

    return epoch


def compare(network: str, precision: str, args: argparse.Namespace) -> dict:
    """Time every way once a round, after an epoch each to warm up."""
    epochs = {way: epoch_of(way, network, precision, args) for way in WAYS}
    for epoch in epochs.values():
        epoch()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    clock = time.process_time if args.cpu_time else time.perf_counter
    for r in range(args.rounds):
        for way in WAYS[r % len(WAYS) :] + WAYS[: r % len(WAYS)]:
            times[way].append(seconds(epochs[way], args.device, clock))
    ratios = {way: [a / b for a, b in zip(t, times["plain"])] for way, t in times.items() if way != "plain"}
    return {
        "median_ms_a_step": {way: round(1e3 * statistics.median(t) / args.window, 3) for way, t in times.items()},
        "times_plain": {way: round(statistics.median(r), 4) for way, r in ratios.items()},
        "times_plain_quartiles": {
            way: [round(q, 4) for q in statistics.quantiles(r, n=4)[::2]] for way, r in ratios.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="names of create_model; NAME:WIDTH narrows one")
    parser.add_argument("--precisions", nargs="+", default=("fp32",), choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--window", type=int, default=50, help="steps between two readings, and an epoch's steps")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU time, on a busy machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="results/guard_cost_DEVICE.json by default")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result = {
        "what": f"an epoch of {args.window} RS-FGSM steps on {args.batch_size} images of {args.image_size} x "
        f"{args.image_size}, {args.rounds} interleaved rounds" + (", CPU time" if args.cpu_time else ""),
        "goal": f"the guard at most {GOAL} times the training without it",
        "machine": machine(device),
        "seed": args.seed,
        "networks": {n: {p: compare(n, p, args) for p in args.precisions} for n in args.networks},
    }
    rows = [row["times_plain"] for by in result["networks"].values() for row in by.values()]
    cost = [row[way] for row in rows for way in ("warn", "rollback")]
    result |= {"largest": max(cost), "goal_met": max(cost) <= GOAL}
    output = args.output or RESULTS / f"guard_cost_{device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
