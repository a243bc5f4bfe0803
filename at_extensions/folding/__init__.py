"""A frozen twin of a model for attacks to search on: the same logits and input gradients, in less time."""

from at_extensions.folding.twin import FoldedTwin, fold_batchnorm

__all__ = ["FoldedTwin", "fold_batchnorm"]
