"""Layer criticality against the plain loop (every layer, every trial, the whole network): seconds, memory, equality.

python benchmarks/criticality.py                                # all networks; about half an hour on two CPU cores
python benchmarks/criticality.py --cases resnet18_cifar --rounds 3
python benchmarks/criticality.py --device cuda --images 512 --batch-size 128

Both ways get the same network, images in memory, batches, trials and untrained networks, and draw the latter within the
time that is measured. Each measurement is a process of its own, in turn, so that peak memory is that of one way alone:
above what the process held before it began, which includes the network and the images. Weights are random, made to
predict with confidence, since the time does not depend on what they are.

A second part measures the time until every layer's interval is as narrow as ``--ci-width``: with trials where they are
needed, and with equally many trials, those of the layer that needs most, for all. It takes the trained ResNet-18 that
ships in pyautoattack's wheel, on real images where ``--data`` names CIFAR-10 (``--data npz:cifar10.npz``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import at_extensions as atx
from at_extensions.analysis import layer_criticality
from at_extensions.data import load_dataset
from at_extensions.named_models import open_model
from measuring import machine

RESULT = Path(__file__).parent / "results" / "criticality.json"
GOAL, TOLERANCE = 1.6, 1e-5
WAYS = ("plain", "ours")


class Case(NamedTuple):
    """A network and what it is measured on."""

    network: str
    side: int
    classes: int
    images: int
    batch_size: int


CASES = {
    "resnet18_cifar": Case("cifar_resnet18", 32, 10, 256, 32),
    "resnet50_cifar": Case("cifar_resnet50", 32, 10, 128, 32),
    "resnet18_imagenet": Case("resnet18", 224, 1000, 64, 16),
    "resnet50_imagenet": Case("resnet50", 224, 1000, 32, 16),
    "vit_small_imagenet": Case("vit_small_patch16_224", 224, 1000, 32, 16),
}


SHIPPED = Case("pyautoattack", 32, 10, 256, 64)


def prepare(case: Case, args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Return a network with statistics and confidence like a trained one's, and images."""
    torch.manual_seed(args.seed)
    if case is SHIPPED:
        weights = Path(find_spec("pyautoattack").origin).parent / "examples" / "model_test.pt"
        images = torch.rand(args.narrow_images, 3, case.side, case.side)
        if args.data:
            images, _ = load_dataset(args.data, val_fraction=0.0).test.subset(len(images), seed=0).tensors()
        return open_model("cifar_resnet18", weights).model.to(args.device), images.to(args.device)
    model = atx.create_model(case.network, case.classes).eval()
    images = torch.rand(args.images or case.images, 3, case.side, case.side)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        _calibrate(model, images[:8])
        head = atx.models.classifier_of(model)
        spread = model(images[:8]).std(1).mean()
        head.weight.mul_(3 / spread)
        head.bias.mul_(3 / spread)
    return model.to(args.device), images.to(args.device)


def _calibrate(model: nn.Module, images: Tensor) -> None:
    """Let BatchNorm's statistics be those of some images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.train()
    model(images)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


@torch.no_grad()
def plain_loop(model: nn.Module, images: Tensor, trials: int, batch_size: int, seed: int) -> dict[str, list[float]]:
    """Reset every layer in every trial and run the whole network."""
    batches = images.split(batch_size)
    reference = [F.softmax(model(x).double(), 1) for x in batches]
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    values: dict[str, list[float]] = {name: [] for name in names}
    for trial in range(trials):
        fresh = atx.fresh_like(model, seed + trial)
        for name in names:
            layer, new = model.get_submodule(name), fresh.get_submodule(name).state_dict()
            trained = {k: v.clone() for k, v in layer.state_dict().items()}
            layer.load_state_dict(new)
            moved = [1 - F.cosine_similarity(p, F.softmax(model(x).double(), 1)) for x, p in zip(batches, reference)]
            values[name].append(torch.cat(moved).mean().item())
            layer.load_state_dict(trained)
    return values


def measure(case: Case, way: str, args: argparse.Namespace) -> dict:
    """Run one way in this process: seconds, peak memory above the start, and what it found."""
    model, images = prepare(case, args)
    batch_size = args.batch_size or case.batch_size
    options = {"batch_size": batch_size, "seed": args.seed, "progress": False}
    with torch.no_grad():
        model(images[:batch_size])  # warms kernels up; the peak of it is forgotten
    before = _start_memory(images.device)
    start = time.perf_counter()
    if way == "plain":
        values = plain_loop(model, images, args.trials, batch_size, args.seed)
    elif way == "ours":
        values = layer_criticality(model, images, trials=args.trials, memory_limit=args.memory_limit, **options).values
    elif way == "width":
        values = layer_criticality(model, images, ci_width=args.ci_width, max_trials=args.max_trials, **options).values
    else:
        values = layer_criticality(model, images, trials=int(way), **options).values
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": (_peak_memory(images.device) - before) / 2**20, "values": values}


def _start_memory(device: torch.device) -> int:
    """Begin to watch the peak, and return the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set begins anew
    return _status("VmRSS")


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def in_process(name: str, way: str, argv: list[str]) -> dict:
    """Measure in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, *argv, "--measure", name, way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, argv: list[str], rounds: int) -> dict:
    """Measure both ways in turn."""
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for r in range(rounds):
        for way in WAYS if r % 2 == 0 else WAYS[::-1]:
            runs[way].append(in_process(name, way, argv))
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["plain"], runs["ours"])]
    pairs = zip(*(runs[way][0]["values"].values() for way in WAYS))
    difference = max(abs(a - b) for plain, ours in pairs for a, b in zip(plain, ours))
    return {
        "seconds": {way: [round(run["seconds"], 2) for run in runs[way]] for way in WAYS},
        "times_as_fast": round(statistics.median(ratios), 3),
        "largest_difference": difference,
        "peak_memory_mb": {way: round(max(run["peak_mb"] for run in runs[way])) for way in WAYS},
        "layers": len(runs["ours"][0]["values"]),
        "mean_criticality": round(statistics.mean(v for row in runs["ours"][0]["values"].values() for v in row), 4),
        "goal_met": statistics.median(ratios) >= GOAL and difference <= TOLERANCE,
    }


def until_narrow(argv: list[str], args: argparse.Namespace) -> dict:
    """Measure the time until every interval is narrow, and that of equally many trials for every layer."""
    adaptive = in_process("shipped", "width", argv)
    trials = {layer: len(values) for layer, values in adaptive["values"].items()}
    equal = in_process("shipped", str(max(trials.values())), argv)
    return {
        "network": "the CIFAR-10 ResNet-18 in pyautoattack's wheel",
        "data": args.data or "random images",
        "images": args.narrow_images,
        "ci_width": args.ci_width,
        "trials": trials,
        "seconds": {"where_needed": round(adaptive["seconds"], 2), "equal": round(equal["seconds"], 2)},
        "times_as_fast": round(equal["seconds"] / adaptive["seconds"], 3),
        "layers_at_max_trials": sum(count == args.max_trials for count in trials.values()),
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each way")
    parser.add_argument("--images", type=int, help="each network's own number by default")
    parser.add_argument("--batch-size", type=int, help="each network's own by default")
    parser.add_argument("--memory-limit", type=int, default=2 * 2**30)
    parser.add_argument("--data", help="CIFAR-10 for the second part; random images by default")
    parser.add_argument("--narrow-images", type=int, default=SHIPPED.images, help="images of the second part")
    parser.add_argument("--ci-width", type=float, default=0.1)
    parser.add_argument("--max-trials", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    argv = sys.argv[1:]
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure((CASES | {"shipped": SHIPPED})[args.measure[0]], args.measure[1], args)))
        return
    result = {
        "what": f"layer criticality of every convolution and linear layer, {args.trials} trials: the plain loop, ours",
        "goal": f"at least {GOAL} times as fast, largest difference at most {TOLERANCE}",
        "machine": machine(args.device),
        "seed": args.seed,
        "cases": {},
    }
    for name in args.cases:
        case = CASES[name]
        setting = {
            "network": case.network,
            "image_side": case.side,
            "images": args.images or case.images,
            "batch_size": args.batch_size or case.batch_size,
        }
        result["cases"][name] = setting | compare(name, argv, args.rounds)
        print(name, json.dumps(result["cases"][name]), flush=True)
    result["until_narrow"] = until_narrow(argv, args)
    if args.cases:
        result["goal_met"] = all(case["goal_met"] for case in result["cases"].values())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
