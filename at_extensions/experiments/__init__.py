"""Procedures that train models to learn something."""

from at_extensions.experiments.demo import demo

__all__ = ["demo"]
