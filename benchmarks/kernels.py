"""Seconds of PGD-10 steps and of AutoAttack runs with each of the twin's kernels switched on by itself.

python benchmarks/kernels.py steps --threads 1 --networks small_cnn:128
python benchmarks/kernels.py autoattack --data npz:cifar10.npz --threads 1

``steps`` times whole training steps (attack, training pass, SGD) of every way in turn, a few rounds in each of several
processes; ratios are medians over the rounds of the ratio within a round: to the folded twin without kernels, to the
model itself (no twin), and to ``torchattacks``, a plain loop. ``folding_again`` shows the noise. ``autoattack`` trains
each network for a moment by N-FGSM on a part of the data, then runs AutoAttack's standard version on a few test images:
stock pyautoattack, and ``evaluate`` on every way's search model, with and without Square's windows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from at_extensions import create_model
from at_extensions.checks import parse_fraction
from at_extensions.data import load_dataset
from at_extensions.evaluation import evaluate, searching
from at_extensions.evaluation.attacks import square, windows
from at_extensions.folding import FoldedTwin, fold_batchnorm
from at_extensions.folding.backends import VARIABLE
from at_extensions.memory import keep_freed_memory
from at_extensions.methods import FGSMAT, PGDAT
from at_extensions.runs import write_json
from measuring import load, machine, seconds

RESULTS = Path(__file__).parent / "results" / "kernels"
NETWORKS = (
    "cifar_resnet18:64:16",
    "cifar_resnet18:16:64",
    "preact_resnet18::16",
    "wide_resnet_16_2::32",
    "small_cnn::64",
)
KERNELS = {  # way -> the kernels that are on
    "folding": (),
    "folding_again": (),  # the difference is noise
    "winograd": ("winograd",),
}
EPS, ALPHA = 8 / 255, 2 / 255


def twin_with(kernels: tuple[str, ...], model: nn.Module, **options) -> FoldedTwin | None:
    """Return the model's twin with these kernels alone."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(int("winograd" in kernels))
    try:
        return fold_batchnorm(model, **options)
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


# --- steps ------------------------------------------------------------------------------------------------------------


def network_of(name: str, seed: int) -> nn.Module:
    """Return ``NAME[:WIDTH[:...]]``, the same weights each time."""
    torch.manual_seed(seed)
    name, width, *_ = (*name.split(":"), "")
    return create_model(name, 10, **({"width": int(width)} if width else {})).train()


def step_of(way: str, network: str, x: Tensor, y: Tensor, precision: str, seed: int) -> Callable[[], object]:
    """Return one way's whole training step."""
    model = network_of(network, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    if way == "torchattacks":
        import torchattacks

        attack = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=10)
        return lambda: update(F.cross_entropy(model.train()(attack(x, y)), y), optimizer)
    model.to(memory_format=torch.channels_last)
    images = x.contiguous(memory_format=torch.channels_last)
    method = PGDAT(model, eps=EPS, alpha=ALPHA, steps=10, twin=way != "model")
    if way in KERNELS:
        method._twin.append(twin_with(KERNELS[way], model))
    elif way == "compiled":
        method._twin.append(twin_with((), model))
    if way == "compiled":
        method.compile()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = method(images, y).loss
        update(loss, optimizer)

    return step


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_steps(network: str, precision: str, args: argparse.Namespace) -> dict:
    """Return every way's seconds, a round each, and the ratios; a few rounds in each of several processes."""
    times: dict[str, list[float]] = {way: [] for way in args.ways}
    spawn = multiprocessing.get_context("spawn")
    for number in range(args.processes):  # memory lies well or badly for a process's whole life
        with spawn.Pool(1) as pool:
            for way, spent in pool.apply(time_rounds, (network, precision, args, number)).items():
                times[way] += spent
    return {"batch_size": int(network.split(":")[2]), "seconds": _rounded(times), "ratios": ratios(times)}


def clocked(work: Callable[[], object], clock: str) -> float:
    """Return the seconds of a piece of work: on the wall, or of this process on a CPU that others use too."""
    if clock == "wall":
        return seconds(work)
    start = time.process_time()
    work()
    return time.process_time() - start


def time_rounds(network: str, precision: str, args: argparse.Namespace, number: int) -> dict[str, list[float]]:
    """Return every way's seconds in rounds within this process, each in another order."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    keep_freed_memory()
    shuffle = random.Random(number).shuffle
    batch = int(network.split(":")[2])
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.rand(batch, 3, 32, 32, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    order = list(args.ways)
    shuffle(order)
    steps = {way: step_of(way, network, x, y, precision, args.seed) for way in order}
    for work in steps.values():
        work()
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(args.rounds):
        shuffle(order)
        for way in order:
            times[way].append(clocked(steps[way], args.clock))
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Return how long every way takes relative to the folded twin and to the others' loop."""
    found = {}
    for base in ("folding", "model", "torchattacks"):
        for way in times if base in times else ():
            if way != base:
                pairs = zip(times[way], times[base], strict=True)
                found[f"{way} / {base}"] = round(statistics.median(a / b for a, b in pairs), 3)
    return found


def _rounded(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {way: [round(t, 4) for t in spent] for way, spent in times.items()}


def main_steps(args: argparse.Namespace) -> None:
    result = {
        "what": f"one PGD-10 training step on images of 32 x 32, {args.rounds} interleaved rounds in each of "
        f"{args.processes} processes",
        "machine": machine(),
        "seed": args.seed,
        "clock": args.clock,
        "networks": {},
    }
    for network in args.networks:
        for precision in args.precisions:
            if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                found: object = "not measurable here: the CPU has no bfloat16 instructions"
            else:
                found = measure_steps(network, precision, args)
                print(network, precision, found["ratios"], flush=True)
            result["networks"].setdefault(network, {})[precision] = found
            result["machine"]["load_after"] = load()
            write_json(args.out or RESULTS / "steps.json", result)


# --- AutoAttack -------------------------------------------------------------------------------------------------------


def trained(network: str, args: argparse.Namespace) -> nn.Module:
    """Return a network after a moment of N-FGSM, the same each time; kept in ``args.cache``."""
    model = network_of(network, args.seed)
    kept = args.cache / f"{network.replace(':', '_')}.pt" if args.cache else None
    if kept is not None and kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model.eval()
    x, y = load_dataset(args.data).train.tensors(args.train_images)
    method = FGSMAT(model.to(memory_format=torch.channels_last), eps=EPS, variant="n", seed=args.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = args.epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=batches)
    generator = torch.Generator().manual_seed(args.seed)
    for number in range(batches):
        rows = torch.randint(len(x), (128,), generator=generator)
        images = x[rows].contiguous(memory_format=torch.channels_last)
        update(method(images.flip(3) if number % 2 else images, y[rows]).loss, optimizer)
        schedule.step()
    model.to(memory_format=torch.contiguous_format).eval()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    return model


def run_autoattack(way: str, model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> dict:
    """Return the seconds and verdicts of a whole standard run."""
    if way == "stock":
        import autoattack_speed

        settings = types.SimpleNamespace(
            eps=args.eps, norm="Linf", seed=args.seed, device="cpu", batch_size=len(x), queries=args.queries
        )
        outcome: dict = {}
        spent = clocked(lambda: outcome.update(autoattack_speed.stock(model, x, y, settings)), args.clock)
        return {"seconds": round(spent, 2), "attack_seconds": outcome["attack_seconds"], "robust": outcome["robust"]}
    name, _, without_windows = way.partition("-")
    fold = searching.fold_batchnorm
    if name == "model":
        searching.fold_batchnorm = lambda *_, **__: None
    else:
        searching.fold_batchnorm = lambda m, **options: twin_with(KERNELS[name], m, **options)
    if without_windows:
        square.windows_of = lambda search: None
    try:
        report: list = []
        spent = clocked(
            lambda: report.append(evaluate(model, x, y, eps=args.eps, seed=args.seed, batch_size=len(x))), args.clock
        )
    finally:
        searching.fold_batchnorm, square.windows_of = fold, windows.windows_of
    return {
        "seconds": round(spent, 2),
        "attack_seconds": {k: round(v, 2) for k, v in report[0].attack_seconds.items()},
        "robust": report[0].robust.tolist(),
    }


def main_autoattack(args: argparse.Namespace) -> None:
    test = load_dataset(args.data).test
    result = {
        "what": f"AutoAttack's standard version on the first {args.n_examples} test images, eps {args.eps:.5f}, of "
        f"networks after {args.epochs} epochs of N-FGSM on {args.train_images} images",
        "machine": machine(),
        "seed": args.seed,
        "clock": args.clock,
        "networks": {},
    }
    for network in args.networks:
        model = trained(network, args)
        x, y = test.tensors(args.n_examples)
        found: dict = {}
        for way in args.ways:
            found[way] = run_autoattack(way, model, x, y, args)
            print(
                network, way, found[way]["seconds"], sum(found[way]["robust"]), found[way]["attack_seconds"], flush=True
            )
            spent = {w: [f["seconds"]] for w, f in found.items()}
            stock = {f"stock / {w}": round(spent["stock"][0] / s[0], 3) for w, s in spent.items() if "stock" in spent}
            result["networks"][network] = {"ways": found, "ratios": ratios(spent), "speedups": stock}
            write_json(args.out or RESULTS / "autoattack.json", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("steps", help="whole PGD-10 training steps")
    steps.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME:WIDTH:BATCH")
    steps.add_argument("--precisions", nargs="+", default=("fp32", "bf16"), choices=("fp32", "bf16"))
    steps.add_argument("--ways", nargs="+", default=("torchattacks", "model", *KERNELS, "compiled"))
    steps.add_argument("--rounds", type=int, default=3, help="in each process")
    steps.add_argument("--processes", type=int, default=3)
    attack = commands.add_parser("autoattack", help="AutoAttack's standard version")
    attack.add_argument("--networks", nargs="+", default=("cifar_resnet18:16", "wide_resnet_10_2"))
    attack.add_argument("--ways", nargs="+", default=("stock", "model", "folding", "folding-nowindows"))
    attack.add_argument("--data", default="cifar10", help="name of a dataset, or npz:PATH")
    attack.add_argument("--train-images", type=int, default=10_000)
    attack.add_argument("--epochs", type=int, default=3)
    attack.add_argument("--cache", type=Path, help="folder that keeps the trained networks")
    attack.add_argument("--n-examples", type=int, default=32)
    attack.add_argument("--queries", type=int, default=5000, help="of Square, for stock")
    attack.add_argument("--eps", type=parse_fraction, default=EPS)
    for command in (steps, attack):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, help="CPU threads; all by default")
        command.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where others compute too")
        command.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    {"steps": main_steps, "autoattack": main_autoattack}[args.command](args)


if __name__ == "__main__":
    main()
