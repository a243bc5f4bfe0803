"""Winograd's convolutions of a twin against torch's: seconds of the forward pass with the input gradient, and errors.

python benchmarks/convolutions.py --threads 2
python benchmarks/convolutions.py --shapes 640x640x8 160x160x32 --batch-size 50

A shape is CHANNELS_IN x CHANNELS_OUT x PIXELS_OF_A_SIDE of 3 x 3 convolutions in float32. Both ways take turns. The
errors are relative, against float64 with the very weights. ``weights_seconds`` is the time of transforming the weights,
once after each change of them.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from at_extensions.folding.cpu import winograd
from at_extensions.memory import keep_freed_memory
from at_extensions.runs import write_json
from measuring import load, machine, seconds

RESULT = Path(__file__).parent / "results" / "convolutions.json"
SHAPES = ("96x96x16", "128x128x16", "160x160x32", "192x192x8", "256x256x8", "320x320x16", "512x512x4", "640x640x8")
SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")


def gradient(convolve: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the convolution and the gradient of its input."""
    x = x.detach().requires_grad_()
    y = convolve(x)
    return y.detach(), torch.autograd.grad(y, x, cotangent)[0]


def parse(shape: str) -> tuple[int, ...]:
    """Return channels in and out, and the side."""
    match = SHAPE.fullmatch(shape)
    if match is None:
        raise SystemExit(f"{shape!r} is no INxOUTxSIDE")
    return tuple(map(int, match.groups()))


def error(ours: Tensor, truth: Tensor) -> float:
    """Return the relative error."""
    return ((ours.double() - truth).norm() / truth.norm()).item()


def compare(shape: str, args: argparse.Namespace) -> dict:
    """Return the seconds of both ways, a round each, their errors and the ratio of the medians."""
    torch.manual_seed(args.seed)
    inputs, outputs, side = parse(shape)
    layout = {"memory_format": torch.channels_last}
    weight = torch.randn(outputs, inputs, 3, 3).contiguous(**layout)
    x = torch.randn(args.batch_size, inputs, side, side).contiguous(**layout)
    cotangent = torch.randn(args.batch_size, outputs, side, side).contiguous(**layout)
    truth = gradient(lambda x: F.conv2d(x, weight.double(), padding=1), x.double(), cotangent.double())
    transformed = winograd.transform(weight)
    ways = {"torch": lambda x: F.conv2d(x, weight, padding=1), "twin": lambda x: winograd.conv2d(x, transformed)}
    found: dict = {"errors": {}}
    for way, convolve in ways.items():
        found["errors"][way] = [error(a, t) for a, t in zip(gradient(convolve, x, cotangent), truth)]
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for r in range(args.rounds):
        for way in sorted(ways, reverse=bool(r % 2)):
            spent[way].append(seconds(lambda convolve=ways[way]: gradient(convolve, x, cotangent)))
    found["seconds"] = spent
    found["speedup"] = round(statistics.median(spent["torch"]) / statistics.median(spent["twin"]), 3)
    found["weights_seconds"] = round(
        statistics.median(seconds(lambda: winograd.transform(weight)) for _ in range(3)), 5
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="INxOUTxSIDE")
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
        found = result["shapes"].setdefault(shape, {})["fp32"] = compare(shape, args)
        print(f"{shape:<12} {found['speedup']:.2f} times as fast", flush=True)
    result["machine"]["load_after"] = load()
    write_json(args.out, result)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
