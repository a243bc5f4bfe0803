"""Optimisers."""

from at_extensions.optim.deat import DEAT

__all__ = ["DEAT"]
