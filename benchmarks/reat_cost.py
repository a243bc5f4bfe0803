"""What a REAT step costs beside a PGD-AT step: the same network, attack steps and batch, interleaved rounds.

python benchmarks/reat_cost.py                                   # CIFAR networks; minutes on a CPU
python benchmarks/reat_cost.py --networks small_cnn --batch-size 16 --image-size 8 --steps 1 --rounds 3
python benchmarks/reat_cost.py --device cuda --precisions bf16
"""

from __future__ import annotations

from at_extensions.methods import PGDAT, REAT, BalancedSoftmaxAT
from step_cost import COUNTS, Make, measure, options

GOAL = 1.03  # times the step of PGD-AT
METHODS: dict[str, Make] = {
    "pgd": lambda model, attack: PGDAT(model, **attack),
    "pgd_again": lambda model, attack: PGDAT(model, **attack),
    "at_bsl": lambda model, attack: BalancedSoftmaxAT(model, COUNTS, **attack),
    "reat_released": lambda model, attack: REAT(model, COUNTS, variant="released", **attack),
    "reat_pairwise_logit": lambda model, attack: REAT(
        model, COUNTS, variant="pairwise", attack_weighting="logit", **attack
    ),
}


def main() -> None:
    measure(
        METHODS,
        options(__doc__, "reat_cost"),
        goal=f"REAT at most {GOAL} times PGD-AT",
        limit=GOAL,
        judged=lambda name: "reat" in name,
    )


if __name__ == "__main__":
    main()
