"""Seconds and memory of one PGD-10 training step: its floor, ours with and without the folded twin, torchattacks, ART.

python benchmarks/training_step.py                                    # every network and precision; minutes on a CPU
python benchmarks/training_step.py --networks small_cnn --rounds 9
python benchmarks/training_step.py --device cuda --precisions bf16

The floor is what a step cannot do without: 10 input-gradient passes in eval mode, a forward and backward pass in train
mode, and the optimiser's step, on the same network, batch and precision. It comes in the two memory formats; ours,
as the trainer runs it, is in channels_last. torchattacks and ART run as their documentation shows them, in fp32;
``torchattacks_autocast`` has the whole plain loop under bf16 autocast. Columns have a process each and take turns
within a round; ratios are medians over rounds of the ratio within a round. Peak memory is what the steps add to the
memory of the network and batch. The floor's share of convolutions, profiled in one more step, is what no leaving out
of anything else can get below.

On a CPU, every column runs as the commands of this package do, with freed memory kept in the process
(``keep_freed_memory``); by default glibc's malloc gives it back and faults it in anew in every step.
--default-allocator measures that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from at_extensions import create_model
from at_extensions.data import ImageSplit, make_loader
from at_extensions.folding.backends import VARIABLE
from at_extensions.memory import keep_freed_memory
from at_extensions.methods import PGDAT
from measuring import load, machine, seconds

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("cifar_resnet18", "cifar_resnet18:16", "preact_resnet18", "wide_resnet_16_2", "small_cnn")
COLUMNS = (
    *("floor", "floor_contiguous", "ours", "ours_twin", "ours_twin_without_kernels"),
    *("torchattacks", "torchattacks_autocast", "art"),
)
COMPILED = ("ours_compiled",)  # minutes of compilation: only where named by --columns
RATIOS = {  # name -> (above the line, below it)
    "ours / floor": ("ours", "floor"),
    "twin / floor": ("ours_twin", "floor"),
    "ours / floor_contiguous": ("ours", "floor_contiguous"),
    "twin / floor_contiguous": ("ours_twin", "floor_contiguous"),
    "twin without kernels / floor": ("ours_twin_without_kernels", "floor"),
    "ours / twin": ("ours", "ours_twin"),
    "torchattacks / ours": ("torchattacks", "ours"),
    "torchattacks / twin": ("torchattacks", "ours_twin"),
    "torchattacks_autocast / twin": ("torchattacks_autocast", "ours_twin"),
    "art / ours": ("art", "ours"),
    "art / twin": ("art", "ours_twin"),
    "compiled / floor": ("ours_compiled", "floor"),
}
POST_ACTIVATION = "cifar_resnet18"  # every BatchNorm of it folds
EPS, ALPHA = 8 / 255, 2 / 255
Step = Callable[[], object]


class Setting:
    """What all columns of one comparison share: network, batch, precision, device, steps of the attack and seed."""

    def __init__(self, network: str, precision: str, args: argparse.Namespace):
        self.network, self.precision, self.steps, self.seed = network, precision, args.steps, args.seed
        self.device = torch.device(args.device)
        self.size = args.image_size
        generator = torch.Generator().manual_seed(args.seed)
        self.x = torch.rand(args.batch_size, 3, self.size, self.size, generator=generator).to(self.device)
        self.y = torch.randint(10, (args.batch_size,), generator=generator).to(self.device)

    def model(self, *, channels_last: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the network, the same weights each time, with its optimiser."""
        torch.manual_seed(self.seed)
        name, _, width = self.network.partition(":")
        model = create_model(name, 10, **({"width": int(width)} if width else {})).to(self.device).train()
        if channels_last:
            model.to(memory_format=torch.channels_last)
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def images(self, *, channels_last: bool) -> torch.Tensor:
        """Return the batch in that memory format."""
        return self.x.contiguous(memory_format=torch.channels_last) if channels_last else self.x

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of the setting's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def floor(setting: Setting, *, channels_last: bool = True) -> Step:
    model, optimizer = setting.model(channels_last=channels_last)
    x, y = setting.images(channels_last=channels_last), setting.y
    parameters = list(model.parameters())

    def step() -> None:
        model.eval()
        for p in parameters:
            p.requires_grad_(False)
        with setting.autocast():
            for _ in range(setting.steps):
                attacked = x.clone().requires_grad_()
                torch.autograd.grad(F.cross_entropy(model(attacked), y), attacked)
        for p in parameters:
            p.requires_grad_(True)
        model.train()
        with setting.autocast():
            loss = F.cross_entropy(model(x), y)
        update(loss, optimizer)

    return step


def ours(setting: Setting, *, twin: bool = False, compiled: bool = False) -> Step:
    model, optimizer = setting.model(channels_last=True)
    method = PGDAT(model, eps=EPS, alpha=ALPHA, steps=setting.steps, twin=twin)
    if compiled:
        method.compile(**({"mode": "reduce-overhead"} if setting.device.type == "cuda" else {}))  # CUDA graphs
    x, y = setting.images(channels_last=True), setting.y

    def step() -> None:
        with setting.autocast():
            loss = method(x, y).loss
        update(loss, optimizer)

    return step


def ours_without_kernels(setting: Setting) -> Step:
    os.environ[VARIABLE] = "0"  # in this process alone, read when the first step builds the twin
    return ours(setting, twin=True)


def torchattacks_loop(setting: Setting, *, autocast: bool = False) -> Step:
    import torchattacks

    model, optimizer = setting.model()
    attack = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=setting.steps)
    x, y = setting.x, setting.y

    def step() -> None:
        model.train()
        with setting.autocast() if autocast else contextlib.nullcontext():
            loss = F.cross_entropy(model(attack(x, y)), y)
        update(loss, optimizer)

    return step


def art_trainer(setting: Setting) -> Step:
    from art.defences.trainer import AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    model, optimizer = setting.model()
    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(setting.x.shape[1:]),
        nb_classes=10,
        optimizer=optimizer,
        clip_values=(0.0, 1.0),
        device_type="gpu" if setting.device.type == "cuda" else "cpu",
    )
    batch = len(setting.x)
    trainer = AdversarialTrainerMadryPGD(
        classifier, nb_epochs=1, batch_size=batch, eps=EPS, eps_step=ALPHA, max_iter=setting.steps
    )
    trainer.attack.set_params(verbose=False)
    x, y = setting.x.cpu().numpy(), setting.y.cpu().numpy()

    def step() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            trainer.fit(x, y, nb_epochs=1, batch_size=batch)  # an epoch of one batch is one step

    return step


def update(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


MAKERS: dict[str, Callable[[Setting], Step]] = {
    "floor": floor,
    "floor_contiguous": lambda s: floor(s, channels_last=False),
    "ours": ours,
    "ours_twin": lambda s: ours(s, twin=True),
    "ours_twin_without_kernels": lambda s: ours_without_kernels(s),
    "ours_compiled": lambda s: ours(s, twin=True, compiled=True),
    "torchattacks": torchattacks_loop,
    "torchattacks_autocast": lambda s: torchattacks_loop(s, autocast=True),
    "art": art_trainer,
}


class Worker:
    """A column in a process of its own, so that no column works on memory that another one has left in pieces."""

    def __init__(self, setting: Setting, column: str, argv: list[str]):
        command = [sys.executable, "-W", "ignore", __file__, *argv, "--worker", setting.network, setting.precision]
        self.process = subprocess.Popen(
            [*command, column], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, question: str) -> float:
        """Return the seconds of a ``"step"``, or the share of ``"convolutions"`` in them.

        Or by how many MB the steps so far raised the ``"memory"`` at most.
        """
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self.process.args)} ended with {self.process.wait()}")
        return float(answer)

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


def work(setting: Setting, column: str, *, default_allocator: bool) -> None:
    """Be the process that a worker talks to."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what others print is no answer
    if not default_allocator:
        keep_freed_memory()
    step = MAKERS[column](setting)
    before, _ = memory(setting.device)
    for question in sys.stdin:
        if question.strip() == "step":
            answer = seconds(step, setting.device)
        elif question.strip() == "convolutions":
            answer = share_of_convolutions(step, setting.device)
        else:
            answer = (memory(setting.device)[1] - before) / 2**20
        print(answer, file=answers, flush=True)


def share_of_convolutions(step: Step, device: torch.device) -> float:
    """Return which part of a step's time its convolutions take, forward and backward, as torch's profiler sees it."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, kind.upper())}
    with torch.profiler.profile(activities=activities) as profile:
        step()
    time = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
    on_cpu = torch.autograd.DeviceType.CPU  # operators; kernels are counted with those that launch them
    spent = {event.key: getattr(event, time) for event in profile.key_averages() if event.device_type == on_cpu}
    return sum(t for name, t in spent.items() if "convolution" in name) / sum(spent.values())


def memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes in use and the most there have been: allocated on a GPU, resident on a CPU (0 but on Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    now, peak = (int(lines.get(key, "0").split()[0]) * 2**10 for key in ("VmRSS", "VmHWM"))  # in kB
    return now, peak


def compare(setting: Setting, columns: list[str], argv: list[str], rounds: int) -> tuple[dict, dict, float | None]:
    """Return every column's seconds, once a round, each round starting with another one, and its peak memory in MB.

    And the floor's share of convolutions, if the floor is among the columns.
    """
    workers = {column: Worker(setting, column, argv) for column in columns}
    try:
        for worker in workers.values():  # to warm up
            worker.ask("step")
        times: dict[str, list[float]] = {column: [] for column in columns}
        for r in range(rounds):
            for column in columns[r % len(columns) :] + columns[: r % len(columns)]:
                times[column].append(workers[column].ask("step"))
        peaks = {column: round(worker.ask("memory")) for column, worker in workers.items()}
        return times, peaks, workers["floor"].ask("convolutions") if "floor" in workers else None
    finally:
        for worker in workers.values():
            worker.close()


def batch_loading(args: argparse.Namespace, images: int = 50_000) -> float:
    """Return the seconds that the device-resident loader takes for a batch: crops and flips, averaged over an epoch."""
    generator = torch.Generator().manual_seed(args.seed)
    data = torch.randint(256, (images, 3, args.image_size, args.image_size), dtype=torch.uint8, generator=generator)
    split = ImageSplit(data, torch.randint(10, (images,), generator=generator), 10)
    loader = make_loader(split, args.batch_size, augment="crop_flip", generator=generator, device=args.device)

    def epoch() -> None:
        for _ in loader:
            pass

    epoch()
    return seconds(epoch, torch.device(args.device)) / len(loader)


def goals(network: str, precision: str) -> dict[str, tuple[float | None, float | None]]:
    """Return what each ratio should be at least and at most."""
    folds = network.partition(":")[0] == POST_ACTIVATION
    return {
        "ours / floor": (None, 1.05),
        "twin / floor": (None, {"fp32": 0.95, "bf16": 0.85}[precision] if folds else 1.02),
        "torchattacks / twin": ({"fp32": 1.0, "bf16": 1.8}[precision], None),
        "art / twin": ({"fp32": 1.7, "bf16": 3.0}[precision], None),
    }


def met(network: str, precision: str, ratios: dict[str, float]) -> dict[str, bool]:
    """Return which goals are met, of those that were measured."""
    return {
        name: (least is None or ratios[name] >= least) and (most is None or ratios[name] <= most)
        for name, (least, most) in goals(network, precision).items()
        if name in ratios
    }


def summary(times: dict[str, list[float]], peaks: dict[str, int], convolutions: float | None, loading: float) -> dict:
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(times[above], times[below])), 3)
        for name, (above, below) in RATIOS.items()
        if above in times and below in times
    }
    return {
        "median_seconds": {column: round(statistics.median(t), 4) for column, t in times.items()},
        "seconds": {column: [round(s, 4) for s in t] for column, t in times.items()},
        "peak_memory_mb": peaks,
        "ratios": ratios,
        "share_of_convolutions_in_floor": None if convolutions is None else round(convolutions, 3),
        "share_of_loading": round(loading / (loading + statistics.median(times["ours_twin"])), 5),
    }


def columns_of(setting: Setting, args: argparse.Namespace) -> list[str]:
    """Return the columns that mean something here: autocast in bf16 alone, ART on the networks asked for."""
    left_out = set()
    if setting.precision == "fp32":
        left_out.add("torchattacks_autocast")
    if setting.network not in args.art:
        left_out.add("art")
    return [column for column in args.columns if column not in left_out]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="names of create_model; NAME:WIDTH narrows one")
    parser.add_argument("--precisions", nargs="+", default=("fp32", "bf16"), choices=("fp32", "bf16"))
    parser.add_argument("--columns", nargs="+", default=COLUMNS, choices=COLUMNS + COMPILED)
    parser.add_argument("--art", nargs="*", default=("small_cnn", "cifar_resnet18:16"), help="networks that ART trains")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--default-allocator", action="store_true", help="let malloc give freed memory back")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="steps of PGD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="folder of a JSON a network; results/training_step_DEVICE by default"
    )
    parser.add_argument("--worker", nargs=3, metavar=("NETWORK", "PRECISION", "COLUMN"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    argv = sys.argv[1:]
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.worker:
        network, precision, column = args.worker
        work(Setting(network, precision, args), column, default_allocator=args.default_allocator)
        return

    device = torch.device(args.device)
    loading = batch_loading(args)
    for network in args.networks:
        result = {
            "what": f"one PGD-{args.steps} training step of {network}, {args.batch_size} images of {args.image_size} x "
            f"{args.image_size}, {args.rounds} interleaved rounds",
            "machine": machine(device, "adversarial-robustness-toolbox", "numpy"),
            "seed": args.seed,
            "freed_memory_kept": not args.default_allocator,
            "loading_seconds_per_batch": round(loading, 5),
        }
        for precision in args.precisions:
            setting = Setting(network, precision, args)
            result[precision] = summary(
                *compare(setting, columns_of(setting, args), argv, args.rounds), loading=loading
            )
            result[precision]["goals_met"] = met(network, precision, result[precision]["ratios"])
            print(f"{network} {precision}: {json.dumps(result[precision]['ratios'])}", flush=True)
        result["machine"]["load_after"] = load()
        folder = args.output or RESULTS / f"training_step_{device.type}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{network.replace(':', '_')}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
