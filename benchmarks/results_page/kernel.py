"""The section of RESULTS.md on the empirical NTK."""

from __future__ import annotations

from pathlib import Path

from results_page.words import goal, load, origin, table

PEERS = {
    "loop": "loop over images, all gradients kept",
    "loop_limited": "loop within the limit, groups of parameters",
    "func": "`vmap(grad)`, all gradients kept",
    "func_limited": "`torch.func` tutorial within the limit",
}
OUTPUTS = {"one": "one class", "class": "each of ten classes"}


def ntk(results: Path) -> str:
    found = load(results / "ntk.json")
    rows, notes = [], []
    for run in found["runs"]:
        own, which = run["ours"], f"{OUTPUTS[run['outputs']]}, {run['threads']} thread" + "s" * (run["threads"] > 1)
        peak = f"{own['peak_bytes'] / 2**30:.1f} GiB"
        rows.append((which, "`empirical_ntk`", *_seconds(own["seconds"]), "1", f"{own['flop'] / 1e12:.1f}", "", peak))
        for peer, words in PEERS.items():
            row, faster = run["peers"][peer], run["times_as_fast"][peer]["cpu"]
            held = f"{row['bytes'] / 2**30:.0f} GiB needed" if row["bytes"] else "within the limit"
            rows.append((which, words, *_seconds(row["seconds"]), f"{faster:.1f}", f"{row['flop'] / 1e12:.1f}",
                         f"{run['times_fewer_flop'][peer]:.1f}", held))  # fmt: skip
        notes.append(run["largest_relative_difference"])
    images = found["runs"][0]["measured_parts"]["images"]
    kept = " Freed memory is kept." if found["keep_freed_memory"] else ""
    return (
        origin("python benchmarks/ntk.py", [found], f"Seed: {found['seed']}.")
        + f"\n{found['what'][0].upper()}{found['what'][1:]} by `{found['network']}` ({found['data']}), memory limit "
        f"{found['memory_limit'] / 2**30:.1f} GiB.{kept} `empirical_ntk` is measured whole. The others' times are "
        f"**extrapolated**: a gradient's time, on {images} images, times their number, and the Gram product's time, on "
        "all images and a part of the parameters, times the parts. Seconds are CPU seconds; times as fast and times "
        f"fewer operations are of the row over ours. Largest relative difference between the kernels of the first "
        f"{images} images: {max(notes):.0e}; in float32, a ReLU near 0 can open in one batch size and not in another. "
        f"{goal(found)}\n\n"
        + table(["outputs", "way", "CPU seconds", "wall", "times as fast", "TFLOP", "times fewer", "memory"], rows)
    )


def _seconds(seconds: dict[str, float]) -> tuple[str, str]:
    return f"{seconds['cpu']:.3g}", f"{seconds['wall']:.3g}"
