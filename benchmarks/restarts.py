"""PGD-50 with ten restarts: images that are fooled leave the batch, against the plain loop over all of them.

python benchmarks/restarts.py runs/pgd/checkpoints/best.safetensors --data npz:cifar10.npz --n-images 200

The plain loop attacks every image in every restart with torchattacks' steps and looks at each iterate; both start from
the same points, so that verdicts can be compared image by image. Time is CPU time of this process, of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from at_extensions import load_model
from at_extensions.data import load_test
from at_extensions.evaluation import evaluate
from at_extensions.memory import keep_freed_memory
from measuring import machine

GOAL = 3.0
STEPS, RESTARTS, BATCH = 50, 10, 250


def plain(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return which images (N,) are right at every iterate, and which are at the end of every restart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        robust = model(x).argmax(1) == y
    at_end = robust.clone()
    for _ in range(RESTARTS):
        noise = 2 * torch.rand(x.shape, generator=generator) - 1
        point = torch.clamp(x + eps * noise, x - eps, x + eps).clamp_(0, 1)
        for _ in range(STEPS):
            point.requires_grad_()
            logits = model(point)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), point)
            robust &= logits.argmax(1) == y
            point = point.detach() + eps / 4 * gradient.sign()
            point = torch.clamp(point, x - eps, x + eps).clamp_(0, 1)
        with torch.no_grad():
            right = model(point).argmax(1) == y
        robust &= right
        at_end &= right
    return robust, at_end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a weights file that this package wrote")
    parser.add_argument("--data", default="npz:cifar10.npz")
    parser.add_argument("--n-images", type=int, default=200)
    parser.add_argument("--eps", type=float, default=8 / 255)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "restarts.json")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    model = load_model(args.model).eval().requires_grad_(False)
    x, y = load_test(args.data).subset(args.n_images, seed=args.seed).tensors()
    start = time.process_time()
    report = evaluate(
        model, x, y, eps=args.eps, version="pgd-50-10", seed=args.seed, batch_size=BATCH, progress=False, shard=False
    )
    ours = time.process_time() - start
    start = time.process_time()
    parts = [  # one batch's starts follow from the seed plus its number, as in evaluate
        plain(model, images, labels, args.eps, args.seed + i)
        for i, (images, labels) in enumerate(zip(x.split(BATCH), y.split(BATCH)))
    ]
    theirs = time.process_time() - start
    robust, at_end = (torch.cat(part) for part in zip(*parts))
    result = {
        "what": f"PGD-{STEPS} with {RESTARTS} restarts on {args.n_images} images, CPU seconds of one thread",
        "goal": f"at least {GOAL:g} times as fast as the plain loop, the same verdicts",
        "machine": machine("cpu"),
        "seed": args.seed,
        "eps": args.eps,
        "model": model.recipe,
        "clean_accuracy": report.clean_accuracy,
        "robust_accuracy": report.robust_accuracy,
        "seconds": {"plain": round(theirs, 2), "ours": round(ours, 2)},
        "times_as_fast": round(theirs / ours, 2),
        "verdicts_that_differ": int((robust != report.robust).sum()),
        "fooled_at_an_iterate_but_at_no_end": int((at_end & ~report.robust).sum()),
    }
    result["goal_met"] = result["times_as_fast"] >= GOAL and result["verdicts_that_differ"] == 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
