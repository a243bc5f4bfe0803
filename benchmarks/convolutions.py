"""A twin's convolutions against torch's: seconds of the forward pass and of the input gradient, and their errors.

python benchmarks/convolutions.py --threads 2
python benchmarks/convolutions.py --shapes 640x640x8 160x160x32 --batch-size 50 --precisions fp32

A shape is CHANNELS_IN x CHANNELS_OUT x PIXELS_OF_A_SIDE of 3 x 3 convolutions. Both ways take turns; medians. The
errors are relative, against float64.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from at_extensions.folding.convolution import FastConv2d, make_fast
from at_extensions.memory import keep_freed_memory
from at_extensions.runs import write_json
from measuring import load, machine, seconds

RESULT = Path(__file__).parent / "results" / "convolutions.json"
SHAPES = ("64x64x32", "128x128x16", "160x160x32", "256x256x8", "320x320x16", "512x512x4", "512x512x7", "640x640x8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gradient(conv: nn.Conv2d, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the convolution and the gradient of its input."""
    x = x.detach().requires_grad_()
    y = conv(x)
    return y.detach(), torch.autograd.grad(y, x, cotangent)[0]


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


def compare(shape: str, precision: str, args: argparse.Namespace) -> dict:
    """Return the seconds of both ways, a round each, their errors and the ratio of the medians."""
    torch.manual_seed(args.seed)
    inputs, outputs, side = (int(part) for part in shape.split("x"))
    layout = {"memory_format": torch.channels_last}
    conv = nn.Conv2d(inputs, outputs, 3, padding=1).requires_grad_(False)
    x, cotangent = torch.randn(args.batch_size, inputs, side, side), torch.randn(args.batch_size, outputs, side, side)
    conv, x, cotangent = (part.to(DTYPES[precision], **layout) for part in (conv, x, cotangent))
    truth = gradient(copy.deepcopy(conv).double(), x.double(), cotangent.double())
    ways = {"torch": conv, "twin": make_fast([copy.deepcopy(conv)])[0]}
    found: dict = {"seconds": {way: [] for way in ways}, "errors": {}}
    for way, module in ways.items():
        found["errors"][way] = [error(a, t) for a, t in zip(gradient(module, x, cotangent), truth)]
    for r in range(args.rounds):
        for way in sorted(ways, reverse=bool(r % 2)):
            found["seconds"][way].append(seconds(lambda way=way: gradient(ways[way], x, cotangent)))
    ours, plain = (statistics.median(found["seconds"][way]) for way in ("twin", "torch"))
    found["weights_seconds"] = _preparation(ways["twin"], x, cotangent, ours)
    return found | {"speedup": round(plain / ours, 3)}


def _preparation(conv: FastConv2d, x: Tensor, cotangent: Tensor, without: float) -> float:
    """Return what the first call after a change of the weights takes more than a later one."""
    times = []
    for _ in range(3):
        conv.forget()
        times.append(seconds(lambda: gradient(conv, x, cotangent)))
    return round(max(statistics.median(times) - without, 0.0), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="INxOUTxSIDE")
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
            print(f"{shape:<12} {precision}  {found['speedup']:.2f} times as fast", flush=True)
    result["machine"]["load_after"] = load()
    write_json(args.out, result)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
