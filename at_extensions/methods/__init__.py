"""Adversarial training methods: each turns a batch into a loss; the loop stays the user's."""

from at_extensions.methods.awp import AWP
from at_extensions.methods.balanced_softmax import BalancedSoftmaxAT
from at_extensions.methods.fgsm import FGSMAT
from at_extensions.methods.grad_align import GradAlign, grad_align_weight
from at_extensions.methods.mart import MART
from at_extensions.methods.method import Method, Step, check_takes_loss
from at_extensions.methods.pgd import PGDAT
from at_extensions.methods.reat import REAT
from at_extensions.methods.registry import create_method, list_methods, method_options
from at_extensions.methods.standard import Standard
from at_extensions.methods.temporal_ensembling import TemporalEnsembling
from at_extensions.methods.trades import TRADES
from at_extensions.methods.wrapping import Wrapping

__all__ = [
    "AWP",
    "FGSMAT",
    "MART",
    "PGDAT",
    "REAT",
    "TRADES",
    "BalancedSoftmaxAT",
    "GradAlign",
    "Method",
    "Standard",
    "Step",
    "TemporalEnsembling",
    "Wrapping",
    "check_takes_loss",
    "create_method",
    "grad_align_weight",
    "list_methods",
    "method_options",
]
