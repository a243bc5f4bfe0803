"""The sections of RESULTS.md on time, memory and precision."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from results_page.words import goal, load, load_all, network, origin, percent, table

EARLIER = "With CPU kernels most of which have been removed since, on a CPU with AVX-512."


def training_step(results: Path) -> str:
    text = ""
    for folder, flags, words in (
        ("training_step_avx2", "", "A CPU with AVX2:"),
        ("training_step_cpu", "", EARLIER + " Freed memory is kept in every column (`keep_freed_memory`)."),
        ("training_step_cpu_compiled", " --columns floor ours_twin ours_compiled", EARLIER + " With `torch.compile`:"),
        ("training_step_cpu_default_allocator", " --default-allocator", EARLIER + " Malloc gives freed memory back:"),
    ):
        found = load_all(results / folder)
        if found:
            command = f"python benchmarks/training_step.py{flags}"
            text += ("\n" if text else "") + f"{origin(command, [*found.values()])}\n{words}\n\n{_steps(found)}"
    return (
        "Seconds of one PGD-10 step relative to the floor (ten input-gradient passes, one training pass, the "
        "optimiser's step, all in channels_last), and as multiples of ours. The twin is the model with BatchNorm "
        "folded, on which the attack searches. torchattacks and ART run as their documentation shows them, in fp32.\n\n"
        + text
    )


RATIOS = {
    "ours / floor": "without twin / floor",
    "twin / floor": "with twin / floor",
    "compiled / floor": "compiled / floor",
    "torchattacks / twin": "torchattacks / ours",
    "torchattacks_autocast / twin": "torchattacks, autocast / ours",
    "art / twin": "ART / ours",
}


def _steps(found: dict[str, dict]) -> str:
    """Return a table of ratios, and the goals that were not met."""
    lines = [
        (name, row, precision) for name, row in found.items() for precision in ("fp32", "bf16") if precision in row
    ]
    shown = [ratio for ratio in RATIOS if any(ratio in row[precision]["ratios"] for _, row, precision in lines)]
    rows = [
        (f"`{name}`", precision, *(f"{row[precision]['ratios'][ratio]:.2f}" if ratio in row[precision]["ratios"] else ""
                                   for ratio in shown), re.search(r"(\d+) (?:interleaved )?rounds", row["what"])[1])
        for name, row, precision in lines
    ]  # fmt: skip
    missed = [f"{name} in {precision} ({ratio})" for name, row, precision in lines
              for ratio, met in row[precision]["goals_met"].items() if not met]  # fmt: skip
    share = max(row[precision]["share_of_loading"] for _, row, precision in lines)
    words = "all met" if not missed else "missed by " + ", ".join(missed)
    return table(["network", "precision", *(RATIOS[ratio] for ratio in shown), "rounds"], rows) + (
        f"\nGoals: {words}. Loading takes at most {percent(share)} of a step.\n"
    )


def convolutions(results: Path) -> str:
    found = load(results / "convolutions.json")

    def times(shape: dict, precision: str, name: str) -> str:
        return f"{shape[precision][name]:.2f}" if name in shape.get(precision, {}) else ""

    columns = [("fp32", "speedup"), ("bf16", "speedup"), ("bf16", "residual_end_speedup"), ("bf16", "training_speedup")]
    settings = found["settings"]
    return (
        origin("python benchmarks/convolutions.py", [found], f"Seed: {settings['seed']}. Rounds: {settings['rounds']}.")
        + f"\n{EARLIER}\n"
        + f"\nThe convolution with its input's gradient, batch {settings['batch_size']}: torch's seconds over the "
        "twin's. Shapes are input channels x output channels x side, k1 for a 1 x 1 kernel.\n\n"
        + table(
            ["shape", "fp32", "bf16", "bf16, end of a residual block", "bf16, training with the weights' gradient"],
            [(name, *(times(shape, *column) for column in columns)) for name, shape in found["shapes"].items()],
        )
    )


def restarts(results: Path) -> str:
    found = load(results / "restarts.json")
    seconds = found["seconds"]
    return (
        origin("python benchmarks/restarts.py CHECKPOINT --data npz:cifar10.npz", [found], f"Seed: {found['seed']}.")
        + f"\n{found['what']}: {network(found['model'])} at eps {255 * found['eps']:.3g}/255, clean accuracy "
        f"{percent(found['clean_accuracy'])}, robust accuracy {percent(found['robust_accuracy'])}. {goal(found)}\n\n"
        + table(["plain loop", "`evaluate(version=\"pgd-50-10\")`", "times as fast", "verdicts that differ"],
                [(f"{seconds['plain']:.0f} s", f"{seconds['ours']:.0f} s", f"{found['times_as_fast']:.2f}",
                  found["verdicts_that_differ"])])
    )  # fmt: skip


def search_precision(results: Path) -> str:
    found = load(results / "search_precision.json")
    settings = found["settings"]
    rows = [
        (re.sub(r"^runs/|/checkpoints.*", "", name), way, percent(row["equal_signs"], 2),
         percent(row["equal_signs_of_the_larger_half"], 2), f"{row['withstand']} of {model['images']}")
        for name, model in found["models"].items()
        for way, row in model["ways"].items()
    ]  # fmt: skip
    return (
        origin("python benchmarks/search_precision.py CHECKPOINT ... --data npz:cifar10.npz", [found],
               f"Seed: {settings['seed']}.")
        + f"\n{EARLIER} Winograd in bf16 is one of them.\n"
        + "\nWhether the twin's roundings weaken an attack: signs of the input gradient that equal those of the model "
        f"in float64, and images right after PGD-{settings['steps']}. Winograd's ways are taken from "
        f"{settings['channels']} channels on, more often than the twin does.\n\n"
        + table(["network", "search", "equal signs", "in the larger half", "robust images"], rows)
    )  # fmt: skip


KERNELS = {  # ratio in the files -> its column
    "torchattacks / folding": "torchattacks",
    "model / folding": "without a twin",
    "packed / folding": "packed weights",
    "packed+gradients / folding": "and input gradients",
    "winograd / folding": "Winograd",
    "eval_norm / folding": "own BatchNorm gradient",
    "identity / folding": "no identity normalisation",
    "compiled / folding": "compiled",
    "folding_again / folding": "folding again",
}


def kernels(results: Path) -> str:
    """Return which CPU kernels of a twin pay, by whole training steps and AutoAttack runs."""
    found = load_all(results / "kernels")
    steps, suites, notes = [], [], {}
    for file, row in found.items():
        for name, of_network in row["networks"].items():
            if "ways" in of_network:
                seconds = {way: values["seconds"] for way, values in of_network["ways"].items()}
                suites += [
                    (file, f"`{name}`", way, f"{spent:.0f} s", f"{seconds['stock'] / spent:.2f}")
                    for way, spent in seconds.items()
                ]
            else:
                ratios = of_network["fp32"]["ratios"]
                cells = (f"{ratios[ratio]:.2f}" if ratio in ratios else "" for ratio in KERNELS)
                steps.append((file, f"`{name}`", of_network["fp32"]["batch_size"], *cells))
        if row.get("note"):
            notes.setdefault(row["note"], []).append(f"`{file}`")
    text = (
        origin("python benchmarks/kernels.py steps` and `python benchmarks/kernels.py autoattack", [*found.values()])
        + "\nA kernel stays where it saves at least 3 % of a whole step or run. Seconds of a PGD-10 step in fp32 "
        "relative to the twin with folded BatchNorm alone, each kernel added by itself; bf16 needs instructions.\n\n"
        + table(["file", "network", "batch", *KERNELS.values()], steps)
        + "\nThe standard AutoAttack suite, and how many times as fast as stock:\n\n"
        + table(["file", "network", "search", "time", "times stock"], suites)
    )
    return text + "".join(f"\n{', '.join(files)}: {note}.\n" for note, files in notes.items())


WAYS = {"stock": "stock", "fp32": "fp32", "bf16": "bf16 search", "one": "one process, one thread", "two": "two such"}


def autoattack_speed(results: Path) -> str:
    found = load_all(results / "autoattack_speed")
    rows, attacks, differing = [], [], 0
    for file, row in found.items():
        for model in row["models"].values():
            ways, speed = model["ways"], model["speedups"]
            faster = {"fp32": "fp32 / stock", "bf16": "bf16 / stock", "two": "two processes / one"}
            seconds = {way: f"{ways[way]['seconds']:.0f} s" for way in ways}
            cells = [
                seconds.get(way, "") + (f", {speed[faster[way]]:.2f} times" if faster.get(way) in speed else "")
                for way in WAYS
            ]
            robust = next(iter(ways.values()))
            accuracy = (
                f"{percent(robust['clean_accuracy'])}, robust {percent(sum(robust['robust']) / len(robust['robust']))}"
            )
            rows.append((file, network(model["recipe"]), accuracy, *cells))
            differing += sum(way["verdicts_that_differ"] for way in model["against_stock"].values())
            differing += not model.get("two_equal_one", True)
            attacks += [
                (file, WAYS[way], *(f"{s:.0f}" for s in ways[way]["attack_seconds"].values()))
                for way in ("stock", "fp32", "bf16")
                if way in ways
            ]
    first = next(iter(found.values()))
    settings = first["settings"]
    names = next(iter(next(iter(first["models"].values()))["ways"].values()))["attack_seconds"]
    return (
        origin("python benchmarks/autoattack_speed.py CHECKPOINT --data npz:cifar10.npz", [*found.values()],
               f"Seed: {settings['seed']}.")
        + f"\nThe whole standard suite on the first {settings['n_examples']} CIFAR-10 test images, Linf "
        f"{255 * settings['eps']:.0f}/255, against stock pyautoattack on the same network; both keep freed memory. "
        f"Verdicts that differ from stock's, over all ways: {differing}.\n\n"
        + table(["file", "network", "accuracy", *WAYS.values()], rows)
        + "\nSeconds by attack:\n\n"
        + table(["file", "search", *names], attacks)
    )  # fmt: skip


def step_cost(program: str) -> Callable[[Path], str]:
    """Return the writer of the section on a program that times whole steps of several methods."""

    def write(results: Path) -> str:
        found = load(results / f"{program}_cpu.json")
        lines = [(name, precision, row) for name, by in found["networks"].items() for precision, row in by.items()]
        methods = list(dict.fromkeys(method for _, _, row in lines for method in row["times_pgd"]))
        rows = [(f"`{name}`", precision, *(f"{row['times_pgd'][method]:.2f}" for method in methods))
                for name, precision, row in lines]  # fmt: skip
        note = f" {found['note']}" if "note" in found else ""
        return (
            origin(f"python benchmarks/{program}.py", [found], f"Seed: {found['seed']}.")
            + f"\n{found['what'][0].upper()}{found['what'][1:]}: times a PGD-AT step; `pgd_again` shows the noise."
            f"{note} {goal(found)}\n\n" + table(["network", "precision", *methods], rows)
        )

    return write


def guard_cost(results: Path) -> str:
    found = load(results / "guard_cost_cpu.json")
    rows = [
        (f"`{name}`", precision, f"{row['median_ms_a_step']['plain']:.1f} ms",
         *(f"{row['times_plain'][way]:.3f} ({low:.3f} to {high:.3f})"
           for way, (low, high) in row["times_plain_quartiles"].items()))
        for name, by in found["networks"].items()
        for precision, row in by.items()
    ]  # fmt: skip
    ways = list(next(iter(next(iter(found["networks"].values())).values()))["times_plain"])
    return (
        origin("python benchmarks/guard_cost.py", [found], f"Seed: {found['seed']}.")
        + f"\n{found['what'][0].upper()}{found['what'][1:]}, with `CollapseGuard` and no alarm: times the training "
        f"without it, median and quartiles; `plain_again` shows the noise. {goal(found)}\n\n"
        + table(["network", "precision", "a step", *(f"`{way}`" for way in ways)], rows)
    )


def deat_cost(results: Path) -> str:
    found = load(results / "deat_cost.json")
    names = list(next(iter(found["weight_decay"].values())))
    rows = [
        (decay, *(f"{by[name]['median_ms']:.2f} ms, {by[name]['times_sgd_momentum_foreach']:.2f}" for name in names))
        for decay, by in found["weight_decay"].items()
    ]
    text = (
        origin("python benchmarks/deat_cost.py --training-step", [found], f"Seed: {found['seed']}.")
        + f"\n{found['what'][0].upper()}{found['what'][1:]}, {found['rounds']} of them: median, and times that of "
        f"`sgd_momentum_foreach`. {goal(found)}\n\n" + table(["weight decay", *(f"`{name}`" for name in names)], rows)
    )
    step = found.get("pgd10_training_step")
    if step:
        text += f"\nOf a PGD-10 step of `{step['model']}` it is {percent(step['deat_share'], 2)}.\n"
    return text


def criticality(results: Path) -> str:
    found = load(results / "criticality.json")
    rows = [
        (f"`{case['network']}`", f"{case['images']} of {case['image_side']} x {case['image_side']}",
         *(f"{case['seconds'][way][0]:.3g} s" for way in ("plain", "ours")), f"{case['times_as_fast']:.2f}",
         *(f"{case['peak_memory_mb'][way]:,} MB" for way in ("plain", "ours")))
        for case in found["cases"].values()
    ]  # fmt: skip
    worst = max(case["largest_difference"] for case in found["cases"].values())
    text = (
        origin("python benchmarks/criticality.py --images 32 --data npz:cifar10.npz --narrow-images 128", [found],
               f"Seed: {found['seed']}.")
        + f"\nThe plain loop against ours, {found['what'].partition(': the')[0]}; one measurement of each. Largest "
        f"difference of any value: {worst:.0e}. {goal(found)}\n\n"
        + table(["network", "images", "plain loop", "ours", "times as fast", "memory, plain", "memory, ours"], rows)
    )  # fmt: skip
    narrow = found.get("until_narrow")
    if narrow:
        trials, seconds = narrow["trials"].values(), narrow["seconds"]
        text += (
            f"\nUntil each of {len(trials)} layers of {narrow['network']} has an interval {narrow['ci_width']} wide: "
            f"{min(trials)} to {max(trials)} trials a layer, {seconds['where_needed']:.0f} s; as many for every layer: "
            f"{seconds['equal']:.0f} s.\n"
        )
    return text
