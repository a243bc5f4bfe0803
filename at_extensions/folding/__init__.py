"""A frozen twin of a model for attacks to search on: the same logits and input gradients, in less time."""

from at_extensions.folding.few_pixels import training_pass
from at_extensions.folding.twin import FoldedTwin, fold_batchnorm
from at_extensions.folding.windows import Windows

__all__ = ["FoldedTwin", "Windows", "fold_batchnorm", "training_pass"]
