"""The empirical NTK against loops over samples and torch.func's tutorial: CPU seconds, peak memory, equality.

python benchmarks/ntk.py                # ResNet-18, 500 images; one class and each of ten; one thread and two
python benchmarks/ntk.py --network cifar_resnet18:16 --n-images 32 --peer-images 4 --threads 1 --outputs one
python benchmarks/ntk.py --data npz:cifar10.npz --device cuda --threads 8

Ours runs at full size. The peers would take hours and 22 GB for the same kernel, so that their parts are measured and
added up: the seconds of a gradient on ``--peer-images`` images, and those of the Gram product of all images on a part
of the parameters. Four peers:

- ``loop``: the gradient of one image after the other, all kept at once, whatever the memory;
- ``loop_limited``: the same within the memory limit: groups of parameters whose gradients of all images fit, each
  group with a sweep over the images whose backward pass asks for those parameters alone;
- ``func``: ``vmap(grad)`` of torch.func, all kept at once;
- ``func_limited``: the tutorial's function of two batches, called for each pair of blocks of images that fits.

Each measurement is a process of its own. CPU seconds are those of all threads; wall seconds are beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import at_extensions as atx
from at_extensions.analysis import empirical_ntk, ntk_cost
from at_extensions.data import load_dataset
from at_extensions.memory import keep_freed_memory
from measuring import machine

RESULT = Path(__file__).parent / "results" / "ntk.json"
GOALS = {
    "one": {"loop_limited": 5.0, "loop": 2.0},
    "class": {"loop_limited": 5.0},
}
PEERS = ("loop", "loop_limited", "func", "func_limited")
GRAM_PART = 2**17  # parameters of the measured part of the Gram product


def prepare(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode, with BatchNorm's statistics of the images, and the images."""
    torch.manual_seed(args.seed)
    name, _, width = args.network.partition(":")
    model = atx.create_model(name, 10, **({"width": int(width)} if width else {}))
    if args.data:
        x, _ = load_dataset(args.data, val_fraction=0.0).test.subset(args.n_images, seed=args.seed).tensors()
    else:
        x = torch.rand(args.n_images, 3, 32, 32)
    model, x = model.to(args.device), x.to(args.device)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(x[:64])
    return model.eval(), x


def chosen_outputs(name: str) -> int | str:
    """Return ``outputs`` of ``empirical_ntk`` for "one" or "class"."""
    return 0 if name == "one" else name


class Clock:
    """CPU and wall seconds of a block of work."""

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)

    def __enter__(self) -> Clock:
        self._finish()
        self._starts = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self.cpu, self.wall = time.process_time() - self._starts[0], time.perf_counter() - self._starts[1]

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def times(self, factor: float = 1.0) -> dict[str, float]:
        """Return both, times a factor."""
        return {"cpu": factor * self.cpu, "wall": factor * self.wall}


def ours(args: argparse.Namespace, outputs: str) -> dict:
    """Return the time and the peak of memory of ``empirical_ntk``, and its kernel of the first images."""
    model, x = prepare(args)
    wanted, limit = chosen_outputs(outputs), args.memory_limit
    empirical_ntk(model, x[:2], outputs=wanted, memory_limit=2**40, progress=False)  # warms kernels up
    cost = ntk_cost(model, x, outputs=wanted, memory_limit=limit)
    before = _start_memory(x.device)
    with Clock(x.device) as clock:
        kernel = empirical_ntk(model, x, outputs=wanted, memory_limit=limit, progress=False)
    peak = _peak_memory(x.device) - before
    few = kernel[..., : args.peer_images, : args.peer_images]
    return {
        "seconds": clock.times(),
        "peak_bytes": peak,
        "flop": cost.operations,
        "groups": cost.groups,
        "kernel": few.tolist(),
    }


def sample_gradients(model: nn.Module, x: Tensor, logits: Sequence[int], names: Sequence[str] | None = None) -> Tensor:
    """Return gradients (len(logits), N, P) of single logits, one image after the other, by ordinary backward passes."""
    chosen = [p for name, p in model.named_parameters() if names is None or name in names]
    found = torch.empty(len(logits), len(x), sum(p.numel() for p in chosen), device=x.device)
    for i, image in enumerate(x.split(1)):
        (row,) = model(image)
        for k, logit in enumerate(logits):
            parts = torch.autograd.grad(row[logit], chosen, retain_graph=logit != logits[-1])
            torch.cat([part.flatten() for part in parts], out=found[k, i])
    return found


def func_gradients(model: nn.Module, x: Tensor, logit: int) -> Tensor:
    """Return gradients (N, P) of a logit by ``vmap(grad)``."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def of_image(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, weights, (image.unsqueeze(0),))[0, logit]

    return torch.cat([g.flatten(1) for g in vmap(grad(of_image), in_dims=(None, 0))(weights, x).values()], 1)


def parameter_groups(model: nn.Module, images: int, limit: int) -> list[list[str]]:
    """Return groups of parameters whose gradients of all images fit the limit, in as few groups as a sweep allows."""
    groups, held = [[]], 0
    for name, parameter in model.named_parameters():
        size = 4 * parameter.numel() * images
        if groups[-1] and held + size > limit:
            groups, held = [*groups, []], 0
        groups[-1].append(name)
        held += size
    return groups


def peers(args: argparse.Namespace, outputs: str) -> dict:
    """Return measured parts of the peers' times, and the kernel of the first images by the loop."""
    model, x = prepare(args)
    logits = [0] if outputs == "one" else list(range(10))
    few, n = x[: args.peer_images], args.n_images
    sample_gradients(model, few[:1], logits[:1])
    with Clock(x.device) as loop:
        rows = sample_gradients(model, few, logits)
    kernel = rows @ rows.mT
    size = rows.shape[2]
    del rows
    groups, limited = parameter_groups(model, n, args.memory_limit), {"cpu": 0.0, "wall": 0.0}
    for names in groups:
        with Clock(x.device) as clock:
            sample_gradients(model, few, logits[:1], names)
        limited = {k: limited[k] + v for k, v in clock.times(len(logits) / len(few)).items()}
    chunk = few[: max(1, min(len(few), args.memory_limit // 4 // (4 * size)))]
    func_gradients(model, chunk[:1], 0)
    with Clock(x.device) as func:
        func_gradients(model, chunk, 0)
    part = min(size, GRAM_PART)
    block = torch.randn(n, part, device=x.device)
    block[:64] @ block[:64].T
    with Clock(x.device) as gram:
        block @ block.T
    rows_held = max(1, args.memory_limit // (2 * 4 * size))
    return {
        "parameters": size,
        "images": len(few),
        "seconds_per_image": {
            "loop": loop.times(1 / len(few)),
            "loop_limited": limited,
            "func": func.times(len(logits) / len(chunk)),
        },
        "gram_seconds": gram.times(size / part * len(logits)),
        "parameter_groups": len(groups),
        "rows_held": rows_held,
        "forward_flop": 2 * _forward(model, x),
        "kernel": (kernel[0] if outputs == "one" else kernel).tolist(),
    }


def _forward(model: nn.Module, x: Tensor) -> float:
    """Return the multiply-adds of a forward pass of one image, as ``ntk_cost`` counts them."""
    cost = ntk_cost(model, x[:2], outputs=0, memory_limit=2**40)
    return cost.pass_operations / 2 / 2 / 2 / cost.groups


def totals(found: dict, n: int, outputs: str) -> dict[str, dict]:
    """Return the seconds and operations of each peer at full size, added up from its measured parts."""
    each, gram, passes = found["seconds_per_image"], found["gram_seconds"], 1 if outputs == "one" else 10
    blocks = math.ceil(n / found["rows_held"])
    images = {
        "loop": n,
        "loop_limited": n,
        "func": n,
        # the tutorial's function takes the gradients of both batches in each call
        "func_limited": sum(2 * min(found["rows_held"], n) for i in range(blocks) for j in range(i, blocks)),
    }
    gram_flop = 2.0 * n * n * found["parameters"] * passes
    result = {}
    for peer in PEERS:
        unit = each["func" if peer.startswith("func") else peer]
        sweeps = found["parameter_groups"] if peer == "loop_limited" else 1
        forwards = passes if peer != "loop" else 1
        result[peer] = {
            "seconds": {k: images[peer] * unit[k] + gram[k] for k in unit},
            "flop": images[peer] * sweeps * found["forward_flop"] * (forwards + 2 * passes) + gram_flop,
            "image_gradients": images[peer] * sweeps * passes,
            "bytes": 4 * n * found["parameters"] if peer in ("loop", "func") else None,
        }
    return result


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


WORK: dict[str, Callable[[argparse.Namespace, str], dict]] = {"ours": ours, "peers": peers}


def in_process(work: str, outputs: str, threads: int, argv: list[str]) -> dict:
    """Measure in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, *argv, "--measure", work, outputs, str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(outputs: str, threads: int, args: argparse.Namespace, argv: list[str]) -> dict:
    """Measure ours and the peers, and compare the kernels of the first images."""
    runs = [in_process("ours", outputs, threads, argv) for _ in range(args.rounds)]
    found = in_process("peers", outputs, threads, argv)
    own, truth = (torch.tensor(row.pop("kernel"), dtype=torch.float64) for row in (runs[0], found))
    best = min(runs, key=lambda run: run["seconds"]["cpu"])
    result = {
        "outputs": outputs,
        "threads": threads,
        "ours": best | {"every_cpu": [round(run["seconds"]["cpu"], 2) for run in runs]},
        "peers": totals(found, args.n_images, outputs),
        "measured_parts": found,
        "largest_relative_difference": ((own - truth).abs().max() / truth.abs().max()).item(),
    }
    result["times_as_fast"] = {
        peer: {k: round(row["seconds"][k] / best["seconds"][k], 2) for k in ("cpu", "wall")}
        for peer, row in result["peers"].items()
    }
    result["times_fewer_flop"] = {peer: round(row["flop"] / best["flop"], 2) for peer, row in result["peers"].items()}
    result["within_limit"] = best["peak_bytes"] <= args.memory_limit
    result["goal_met"] = result["within_limit"] and all(
        result["times_as_fast"][peer]["cpu"] >= least for peer, least in GOALS[outputs].items()
    )
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="cifar_resnet18", help="name, or name:width")
    parser.add_argument("--n-images", type=int, default=500)
    parser.add_argument("--peer-images", type=int, default=20, help="images on which the peers' gradients are timed")
    parser.add_argument("--outputs", nargs="*", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1, help="measurements of ours; the fastest counts")
    parser.add_argument("--memory-limit", type=int, default=4 * 2**30)
    parser.add_argument("--data", help="CIFAR-10, such as npz:cifar10.npz; random images by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-freed-memory", action="store_true", help="in every process; memory counts as used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", nargs=3, metavar=("WORK", "OUTPUTS", "THREADS"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    argv = sys.argv[1:]
    args = parse(argv)
    if args.peer_images > args.n_images:
        raise SystemExit("--peer-images must be at most --n-images")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.measure:
        work, outputs, threads = args.measure
        if args.keep_freed_memory:
            keep_freed_memory()
        torch.set_num_threads(int(threads))
        print(json.dumps(WORK[work](args, outputs)))
        return
    result = {
        "what": f"the empirical NTK of {args.n_images} images",
        "goal": "at least 5 times as fast as the loop within the memory limit, and for one class 2 times as fast as "
        "the loop without one, in CPU seconds",
        "machine": machine(args.device),
        "network": args.network,
        "data": args.data or "random images",
        "n_images": args.n_images,
        "memory_limit": args.memory_limit,
        "keep_freed_memory": args.keep_freed_memory,
        "seed": args.seed,
        "runs": [],
    }
    for threads in args.threads:
        for outputs in args.outputs:
            result["runs"].append(compare(outputs, threads, args, argv))
            print(json.dumps(result["runs"][-1]), flush=True)
    result["goal_met"] = all(run["goal_met"] for run in result["runs"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
