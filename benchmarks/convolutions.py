"""A twin's convolutions against torch's: seconds of the forward pass with the input gradient, and their errors.

python benchmarks/convolutions.py --threads 2
python benchmarks/convolutions.py --shapes 640x640x8 160x160x32 --batch-size 50 --precisions fp32

A shape is CHANNELS_IN x CHANNELS_OUT x PIXELS_OF_A_SIDE of 3 x 3 convolutions; k1 is added for 1 x 1 kernels, s2 for a
stride of 2. Both ways take turns; medians. The errors are relative, against float64 with the very weights. Then the end
of a residual block, without a gradient: the convolution, a sum and a ReLU. Last, in bf16, what training computes: the
convolution with the gradients of image and weights, by torch alone and within ``training_pass``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from at_extensions.folding import training_pass
from at_extensions.folding.convolution import FastConv2d, make_fast
from at_extensions.memory import keep_freed_memory
from at_extensions.runs import write_json
from measuring import load, machine, seconds

RESULT = Path(__file__).parent / "results" / "convolutions.json"
NARROW = ("3x16x32", "16x16x32", "32x32x16", "64x64x8", "128x128x4")
WIDE = ("64x64x32", "128x128x16", "160x160x32", "256x256x8", "320x320x16", "512x512x4", "512x512x7", "640x640x8")
OTHER = ("96x96x16", "192x192x8", "64x128x32s2", "256x512x8s2", "256x512x8k1s2", "512x512x8k1", "2048x512x4k1")
SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)(?:k(\d))?(?:s(\d))?")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gradient(conv: nn.Conv2d, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the convolution and the gradient of its input."""
    x = x.detach().requires_grad_()
    y = conv(x)
    return y.detach(), torch.autograd.grad(y, x, cotangent)[0]


@torch.no_grad()
def residual_end(conv: nn.Conv2d, x: Tensor, other: Tensor) -> Tensor:
    """Return the convolution plus another tensor, activated, as the blocks of a ResNet end."""
    out = conv(x)
    out += other
    return F.relu(out)


def training(conv: nn.Conv2d, x: Tensor, cotangent: Tensor, context: Callable) -> None:
    """Compute the convolution and the gradients of its input and weights."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), context(conv):
        y = conv(x)
    torch.autograd.grad(y, (x, conv.weight), cotangent)


def parse(shape: str) -> tuple[str | None, ...]:
    """Return channels in and out, side, kernel and stride."""
    match = SHAPE.fullmatch(shape)
    if match is None:
        raise SystemExit(f"{shape!r} is no INxOUTxSIDE with k1 or s2 after it")
    return match.groups()


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


def compare(shape: str, precision: str, args: argparse.Namespace) -> dict:
    """Return the seconds of both ways, a round each, their errors and the ratios of the medians."""
    torch.manual_seed(args.seed)
    inputs, outputs, side, kernel, stride = (int(part or default) for part, default in zip(parse(shape), "00031"))
    layout = {"memory_format": torch.channels_last}
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2).requires_grad_(False)
    x = torch.randn(args.batch_size, inputs, side, side)
    trained, image = (copy.deepcopy(part).to(**layout) for part in (conv, x))
    cotangent = torch.randn_like(conv(x))
    conv, x, cotangent = (part.to(DTYPES[precision], **layout) for part in (conv, x, cotangent))
    truth = gradient(copy.deepcopy(conv).double(), x.double(), cotangent.double())
    ways = {"torch": conv, "twin": make_fast([copy.deepcopy(conv)])[0]}
    found: dict = {"errors": {}}
    for way, module in ways.items():
        found["errors"][way] = [error(a, t) for a, t in zip(gradient(module, x, cotangent), truth)]
    found["seconds"] = _taking_turns({way: lambda m=m: gradient(m, x, cotangent) for way, m in ways.items()}, args)
    found["speedup"] = _speedup(found["seconds"])
    found["weights_seconds"] = _preparation(
        ways["twin"], x, cotangent, without=statistics.median(found["seconds"]["twin"])
    )
    ways["twin"].ends_with_relu = True
    ends = {way: lambda m=m: residual_end(m, x, cotangent) for way, m in ways.items()}
    found["residual_end_seconds"] = _taking_turns(ends, args)
    found["residual_end_speedup"] = _speedup(found["residual_end_seconds"])
    if precision == "bf16":
        passes = {"torch": lambda model: contextlib.nullcontext(), "twin": training_pass}
        runs = {
            way: lambda c=context: training(trained.requires_grad_(), image, cotangent, c)
            for way, context in passes.items()
        }
        found["training_seconds"] = _taking_turns(runs, args)
        found["training_speedup"] = _speedup(found["training_seconds"])
    return found


def _taking_turns(ways: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of both ways, a round each."""
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for work in ways.values():
        work()
    for r in range(args.rounds):
        for way in sorted(ways, reverse=bool(r % 2)):
            spent[way].append(seconds(ways[way]))
    return spent


def _speedup(spent: dict[str, list[float]]) -> float:
    return round(statistics.median(spent["torch"]) / statistics.median(spent["twin"]), 3)


def _preparation(conv: FastConv2d, x: Tensor, cotangent: Tensor, without: float) -> float:
    """Return what the first call after a change of the weights takes more than a later one."""
    times = []
    for _ in range(3):
        conv.forget()
        times.append(seconds(lambda: gradient(conv, x, cotangent)))
    return round(max(statistics.median(times) - without, 0.0), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=NARROW + WIDE + OTHER, metavar="INxOUTxSIDE")
    parser.add_argument("--precisions", nargs="+", default=tuple(DTYPES), choices=DTYPES)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    settings = {"batch_size": args.batch_size, "rounds": args.rounds, "seed": args.seed}
    result: dict = {"machine": machine(), "settings": settings, "shapes": {}}
    for shape in args.shapes:
        for precision in args.precisions:
            found = result["shapes"].setdefault(shape, {})[precision] = compare(shape, precision, args)
            ratios = f"{found['speedup']:.2f}, residual end {found['residual_end_speedup']:.2f}"
            ratios += f", training {found['training_speedup']:.2f}" if "training_speedup" in found else ""
            print(f"{shape:<12} {precision}  {ratios} times as fast", flush=True)
    result["machine"]["load_after"] = load()
    write_json(args.out, result)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
