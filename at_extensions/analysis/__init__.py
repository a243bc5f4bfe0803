"""Measurements of a given model (layer criticality, gradient noise) and of an optimiser's diffusion."""

from at_extensions.analysis import diffusion
from at_extensions.analysis.criticality import LayerCriticality, layer_criticality
from at_extensions.analysis.diffusion import effective_lr, gradient_noise, matched_lr

__all__ = ["LayerCriticality", "diffusion", "effective_lr", "gradient_noise", "layer_criticality", "matched_lr"]
