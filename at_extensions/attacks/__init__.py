"""Attacks that torchattacks lacks, and the context in which any of its attacks runs."""

from at_extensions.attacks.class_eps import ClassEpsPGD, robust_lt_scales
from at_extensions.attacks.first_pass import FirstPass, first_pass
from at_extensions.attacks.nfgsm import NFGSM
from at_extensions.attacks.norms import norm_of, radius_of, validation_attack
from at_extensions.attacks.pgd import PGD, Loss
from at_extensions.attacks.running import check_attack, perturb, range_of, set_range
from at_extensions.untouched import RandomStream, attacking

__all__ = [
    "NFGSM",
    "PGD",
    "ClassEpsPGD",
    "FirstPass",
    "Loss",
    "RandomStream",
    "attacking",
    "check_attack",
    "first_pass",
    "norm_of",
    "perturb",
    "radius_of",
    "range_of",
    "robust_lt_scales",
    "set_range",
    "validation_attack",
]
