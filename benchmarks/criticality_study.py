"""Does adversarial training make early and middle layers critical? Measured on trained networks of one architecture.

python benchmarks/criticality_study.py --data npz:cifar10.npz \
    --models standard=runs/standard@0 shipped=pyautoattack@0 at2=runs/at2@2/255 at8=runs/at8@8/255

A model is NAME=SOURCE@EPS: a run directory or a weights file, ``pyautoattack`` for the CIFAR-10 ResNet-18 that ships in
that package's wheel, or ARCHITECTURE::CHECKPOINT; and the Linf radius that it was trained for, 0 for standard training.
The first one is what the others are compared with. Results and pictures go to results/criticality_study/.

The claims (arXiv 2410.14470): adversarial training raises the criticality of early and middle layers, and spreads it
more evenly; and it grows with eps. A difference counts where its 95 % interval over resets does not hold 0. Early,
middle and late are thirds of the layers in the order of depth.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from at_extensions.analysis import LayerCriticality, layer_criticality
from at_extensions.attacks import PGD
from at_extensions.data import load_dataset
from at_extensions.memory import keep_freed_memory
from at_extensions.named_models import open_model
from at_extensions.publishing import criticality_plots as plots
from at_extensions.publishing.criticality import write_criticality
from at_extensions.publishing.figures import save_png
from at_extensions.runs import write_json
from measuring import machine

RESULTS = Path(__file__).parent / "results" / "criticality_study"
PARTS = ("early", "middle", "late")


class Subject(NamedTuple):
    """A trained model of the study."""

    name: str
    source: str
    checkpoint: str | None
    eps: float

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Read NAME=SOURCE@EPS."""
        name, found, rest = text.partition("=")
        source, at, eps = rest.rpartition("@")
        if not (found and at and name and source):
            raise argparse.ArgumentTypeError(f"expected NAME=SOURCE@EPS, got {text!r}")
        if source == "pyautoattack":
            shipped = Path(find_spec("pyautoattack").origin).parent / "examples" / "model_test.pt"
            return cls(name, "cifar_resnet18", str(shipped), float(Fraction(eps)))
        source, _, checkpoint = source.partition("::")
        return cls(name, source, checkpoint or None, float(Fraction(eps)))


def thirds(result: LayerCriticality) -> LayerCriticality:
    """Return the mean of each third of the layers, trial by trial, over the trials that all layers have."""
    layers, trials = result.layers, min(result.trials.values())
    ends = [0, len(layers) // 3, 2 * len(layers) // 3, len(layers)]
    groups = {part: layers[low:high] for part, low, high in zip(PARTS, ends, ends[1:])} | {"all": layers}
    means = {
        part: [statistics.fmean(result.values[name][t] for name in names) for t in range(trials)]
        for part, names in groups.items()
    }
    return LayerCriticality(means)


def evenness(result: LayerCriticality) -> dict[str, float]:
    """Return how evenly criticality is spread over layers."""
    values = list(result.mean.values())
    share = [v / sum(values) for v in values if v > 0]
    entropy = -sum(s * math.log(s) for s in share) / math.log(len(values))
    return {"std_over_layers": statistics.pstdev(values), "lowest": min(values), "normalised_entropy": entropy}


def verdict(low: float, high: float) -> str:
    """Return whether an interval confirms that something grew."""
    return "confirmed" if low > 0 else "refuted" if high < 0 else "undecided"


def compare(base: LayerCriticality, other: LayerCriticality) -> dict:
    """Return by how much each third of ``other`` exceeds that of ``base``."""
    rows = {}
    for part, (mean, low, high) in thirds(other).minus(thirds(base)).items():
        ends = {} if math.isnan(low) else {"low": low, "high": high}
        rows[part] = {"difference": mean, **ends, "raised": verdict(low, high)}
    spread = evenness(other)["normalised_entropy"] > evenness(base)["normalised_entropy"]
    return rows | {"spread_more_evenly": spread}


def growth(results: dict[str, LayerCriticality], subjects: list[Subject]) -> dict:
    """Return how the average over layers goes with eps."""
    from scipy.stats import spearmanr

    points = sorted((s.eps, results[s.name].average) for s in subjects)
    rank = spearmanr(*zip(*points)).statistic if len({eps for eps, _ in points}) > 2 else None
    return {"eps_and_average": points, "spearman": None if rank is None else float(rank)}


def measure(subject: Subject, images, labels, args: argparse.Namespace) -> LayerCriticality:
    model, fresh = open_model(subject.source, subject.checkpoint, num_classes=int(labels.max()) + 1)
    model = model.to(args.device)
    attack = None if not args.attack_eps else PGD(model, args.attack_eps, args.attack_eps / 4, 10)
    return layer_criticality(
        model,
        images,
        labels,
        fresh=fresh,
        inputs=attack,
        reset=args.reset,
        trials=args.trials,
        ci_width=args.ci_width,
        max_trials=args.max_trials,
        batch_size=args.batch_size,
        seed=args.seed,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", type=Subject.parse, required=True, metavar="NAME=SOURCE@EPS")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--root", help="folder that holds the data set")
    parser.add_argument("--n-images", type=int, default=1000, help="test images, evenly over the classes")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--ci-width", type=float, help="go on until each interval is this narrow")
    parser.add_argument("--max-trials", type=int, default=20)
    parser.add_argument("--reset", default="random")
    parser.add_argument("--attack-eps", type=lambda t: float(Fraction(t)), help="measure on PGD-10 examples")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    split = load_dataset(args.data, root=args.root, val_fraction=0.0).test.subset(args.n_images, seed=0)
    images, labels = split.tensors()
    results, seconds = {}, {}
    for subject in args.models:
        start = time.perf_counter()
        results[subject.name] = measure(subject, images, labels, args)
        seconds[subject.name] = round(time.perf_counter() - start, 1)
        print(subject.name, results[subject.name], sep="\n", flush=True)
    base, *others = args.models
    study = {
        "question": "Does adversarial training raise the criticality of early and middle layers, and spread it?",
        "machine": machine(args.device),
        "seed": args.seed,
        "data": split.name,
        "n_images": args.n_images,
        "attack_eps": args.attack_eps,
        "reset": args.reset,
        "models": {
            s.name: {
                "eps": s.eps,
                "seconds": seconds[s.name],
                "accuracy": results[s.name].accuracy,
                "average": results[s.name].average,
                "stages": results[s.name].by_stage(),
                "thirds": thirds(results[s.name]).mean,
                "evenness": evenness(results[s.name]),
            }
            for s in args.models
        },
        "against": base.name,
        "raised": {other.name: compare(results[base.name], results[other.name]) for other in others},
        "with_eps": growth(results, args.models),
    }
    write_criticality(results, args.out)
    if len({s.eps for s in args.models}) > 1:
        save_png(plots.eps_curves(results, {s.name: s.eps for s in args.models}), args.out / "criticality_eps.png")
    print(write_json(args.out / "study.json", study))


if __name__ == "__main__":
    main()
