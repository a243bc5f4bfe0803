"""A frozen twin of a model for attacks to search on: the same logits and input gradients, in less time."""

from at_extensions.folding.choosing import TwinChoice, count_steps
from at_extensions.folding.layouts import keeps_contiguous, to_channels_last
from at_extensions.folding.twin import FoldedTwin, TwinWarning, fold_batchnorm, refreshed, warn_once

__all__ = [
    "FoldedTwin",
    "TwinChoice",
    "TwinWarning",
    "count_steps",
    "fold_batchnorm",
    "keeps_contiguous",
    "refreshed",
    "to_channels_last",
    "warn_once",
]
