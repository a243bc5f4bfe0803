"""Measurements of a given model, of a training gradient, and of an optimiser's diffusion."""

from at_extensions.analysis import diffusion
from at_extensions.analysis.collapse import CatastrophicOverfitting, catastrophic_overfitting
from at_extensions.analysis.criticality import LayerCriticality, layer_criticality
from at_extensions.analysis.curvature import InputCurvature, input_curvature
from at_extensions.analysis.diffusion import effective_lr, gradient_noise, matched_lr
from at_extensions.analysis.dispersion import Dispersion, local_dispersion
from at_extensions.analysis.gradient_stability import GradientInstability, gradient_instability
from at_extensions.analysis.overfitting import (
    LabelAgreement,
    RobustOverfitting,
    label_agreement,
    robust_overfitting,
)

__all__ = [
    "CatastrophicOverfitting",
    "Dispersion",
    "GradientInstability",
    "InputCurvature",
    "LabelAgreement",
    "LayerCriticality",
    "RobustOverfitting",
    "catastrophic_overfitting",
    "diffusion",
    "effective_lr",
    "gradient_instability",
    "gradient_noise",
    "input_curvature",
    "label_agreement",
    "layer_criticality",
    "local_dispersion",
    "matched_lr",
    "robust_overfitting",
]
