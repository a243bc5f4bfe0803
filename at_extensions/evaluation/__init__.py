"""Robust accuracy through AutoAttack, and accuracy under any torchattacks attack."""

from at_extensions.evaluation.accuracy import accuracy, count_correct, predictions
from at_extensions.evaluation.autoattack import evaluate
from at_extensions.evaluation.flags import Flag
from at_extensions.evaluation.report import Examples, RobustnessReport
from at_extensions.evaluation.state import state_digest

__all__ = [
    "Examples",
    "Flag",
    "RobustnessReport",
    "accuracy",
    "count_correct",
    "evaluate",
    "predictions",
    "state_digest",
]
