"""Measurements of a given model."""

from at_extensions.analysis.criticality import LayerCriticality, layer_criticality

__all__ = ["LayerCriticality", "layer_criticality"]
