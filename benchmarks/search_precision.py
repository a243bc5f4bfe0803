"""Whether the ways in which a twin computes convolutions weaken an attack: gradients' signs, and PGD's success.

python benchmarks/search_precision.py runs/baseline-cpu/n_fgsm-seed0/checkpoints/best.safetensors --data npz:cifar10.npz

All convolutions direct in both precisions and, in fp32, all 3 x 3 ones of --channels or more by Winograd's algorithm
(which FoldedTwin takes from 160 channels on a CPU, as with fewer it is no faster). Against the model's input gradients
in float64: the share of equal signs, of all numbers and of each image's larger half, and the median relative error.
Then how many images withstand PGD that searches on that twin; the model in fp32 judges.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from at_extensions.attacks import PGD, RandomStream, perturb
from at_extensions.checks import parse_fraction
from at_extensions.data import load_dataset
from at_extensions.folding import FoldedTwin, fold_batchnorm
from at_extensions.folding.cpu import convolution
from at_extensions.memory import keep_freed_memory
from at_extensions.models import load_model
from at_extensions.runs import write_json
from measuring import machine

RESULT = Path(__file__).parent / "results" / "search_precision.json"
WAYS = {  # name -> (whether under bf16 autocast, whether by Winograd's algorithm)
    "fp32": (False, False),
    "fp32, Winograd": (False, True),
    "bf16": (True, False),
}


@contextlib.contextmanager
def channels_from(least: int) -> Iterator[None]:
    """Let twins that are built and run inside take Winograd's algorithm from so many channels on."""
    names = {"_CHANNELS": least, "_TILES": 1}
    before = {name: getattr(convolution, name) for name in names}
    try:
        for name, value in names.items():
            setattr(convolution, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(convolution, name, value)


def gradients(model: Callable[[Tensor], Tensor], batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the gradients of the summed cross-entropy (N, C, H, W)."""
    found = []
    for x, y in batches:
        attacked = x.clone().requires_grad_()
        loss = F.cross_entropy(model(attacked), y, reduction="sum")
        found.append(torch.autograd.grad(loss, attacked)[0])
    return torch.cat(found)


def compare(found: Tensor, truth: Tensor) -> dict:
    """Return how gradients (N, C, H, W) differ from the true ones."""
    found, truth = found.flatten(1).double(), truth.flatten(1)
    equal = (found.sign() == truth.sign()).double()
    large = truth.abs() > truth.abs().median(1, keepdim=True).values
    return {
        "equal_signs": round(equal.mean().item(), 5),
        "equal_signs_of_the_larger_half": round(equal[large].mean().item(), 5),
        "relative_error": round(((found - truth).norm(dim=1) / truth.norm(dim=1)).median().item(), 6),
    }


def withstanding(model: nn.Module, twin: FoldedTwin, batches: list, args: argparse.Namespace, *, lowered: bool) -> int:
    """Return how many images PGD leaves right."""
    attack, stream = PGD(model, eps=args.eps, alpha=args.eps / 4, steps=args.steps), RandomStream(args.seed)
    right = 0
    for x, y in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=lowered):
            adversarial = perturb(attack, x, y, stream=stream, twin=twin)
        with torch.no_grad():
            right += int((model(adversarial).argmax(1) == y).sum())
    return right


def measure(path: str, args: argparse.Namespace) -> dict:
    """Return what comes of every way on one model."""
    model = load_model(path).to(args.device).eval()
    x, y = (part.to(args.device) for part in load_dataset(args.data, root=args.root).test.tensors(args.n_examples))
    batches = list(zip(x.split(args.batch_size), y.split(args.batch_size)))
    exact = copy.deepcopy(model).double()
    truth = gradients(exact, [(x.double(), y) for x, y in batches])
    with torch.no_grad():
        clean = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    found: dict = {"images": len(x), "right_before": clean, "ways": {}}
    for way, (lowered, transformed) in tqdm(WAYS.items(), desc=Path(path).stem, disable=None):
        with channels_from(args.channels if transformed else 2**31):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=lowered):
                twin = fold_batchnorm(model, only_folded=False)
                result = compare(gradients(twin, batches), truth)
            found["ways"][way] = result | {"withstand": withstanding(model, twin, batches, args, lowered=lowered)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoints, as at-extensions train writes them")
    parser.add_argument("--data", default="cifar10", help="name of a dataset, or npz:PATH")
    parser.add_argument("--root", help="folder of data sets")
    parser.add_argument("--n-examples", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--channels", type=int, default=32, help="from how many on Winograd's algorithm is taken")
    parser.add_argument("--eps", type=parse_fraction, default=8 / 255)
    parser.add_argument("--steps", type=int, default=10, help="of PGD, each of eps / 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    keep_freed_memory()
    settings = {name: getattr(args, name) for name in ("data", "channels", "eps", "steps", "batch_size", "seed")}
    result: dict = {"machine": machine(args.device), "settings": settings, "models": {}}
    for path in args.models:
        result["models"][path] = found = measure(path, args)
        for way, numbers in found["ways"].items():
            print(f"{path}: {way:<15} {numbers}", flush=True)
    write_json(args.out, result)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
