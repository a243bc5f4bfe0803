"""What temporal ensembling adds to a training step, before its first epoch and after it, around PGD-AT and TRADES.

python benchmarks/te_cost.py                                     # CIFAR networks; minutes on a CPU
python benchmarks/te_cost.py --networks small_cnn --batch-size 16 --image-size 8 --steps 1 --rounds 3
python benchmarks/te_cost.py --device cuda --precisions bf16

The table has 50,000 rows. ``te`` and ``te_before_start`` are given as times PGD-AT, ``trades_te`` as times TRADES.
"""

from __future__ import annotations

from at_extensions.methods import PGDAT, TRADES, Method, TemporalEnsembling
from step_cost import Make, measure, options

GOAL = 1.05  # times the step of the method inside
SAMPLES, CLASSES = 50_000, 10


def ensembled(inside: Method, start: int = 1) -> Method:
    return TemporalEnsembling(inside, SAMPLES, CLASSES, start=start, end=start + 1)


METHODS: dict[str, Make] = {
    "pgd": lambda model, attack: PGDAT(model, **attack),
    "pgd_again": lambda model, attack: PGDAT(model, **attack),
    "te_before_start": lambda model, attack: ensembled(PGDAT(model, **attack), start=2),
    "te": lambda model, attack: ensembled(PGDAT(model, **attack)),
    "trades": lambda model, attack: TRADES(model, **attack),
    "trades_te": lambda model, attack: ensembled(TRADES(model, **attack)),
}


def main() -> None:
    measure(
        METHODS,
        options(__doc__, "te_cost"),
        goal=f"temporal ensembling at most {GOAL} times the method inside",
        limit=GOAL,
        judged=lambda name: name.startswith("te") or name == "trades_te",
        references={"trades_te": "trades"},
        note="`trades_te` is given as times `trades`.",
    )


if __name__ == "__main__":
    main()
