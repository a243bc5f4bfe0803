"""Procedures that train models to learn something."""

from at_extensions.experiments.cell import Cell
from at_extensions.experiments.demo import demo
from at_extensions.experiments.feature_injection import FeatureInjection, feature_injection, injection_study
from at_extensions.experiments.induced_distribution import induced_distribution
from at_extensions.experiments.induced_errors import InducedDistribution, InducedErrors, NetError
from at_extensions.experiments.injected_accuracy import InjectedAccuracy
from at_extensions.experiments.random_labels import Memorisation, random_labels, random_labels_study
from at_extensions.experiments.robust_accuracy import RobustAccuracy
from at_extensions.experiments.running import StudyProgress, run_study
from at_extensions.experiments.study import Arm, Study
from at_extensions.experiments.summary import StudySummary, summarise
from at_extensions.intervals import PairedDifference, paired_bootstrap, paired_interval, wilson_interval

__all__ = [
    "Arm",
    "Cell",
    "FeatureInjection",
    "InducedDistribution",
    "InducedErrors",
    "InjectedAccuracy",
    "Memorisation",
    "NetError",
    "PairedDifference",
    "RobustAccuracy",
    "Study",
    "StudyProgress",
    "StudySummary",
    "demo",
    "feature_injection",
    "induced_distribution",
    "injection_study",
    "paired_bootstrap",
    "paired_interval",
    "random_labels",
    "random_labels_study",
    "run_study",
    "summarise",
    "wilson_interval",
]
