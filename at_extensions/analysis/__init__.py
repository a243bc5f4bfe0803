"""Measurements of a given model, of a training gradient, and of an optimiser's diffusion."""

from at_extensions.analysis import diffusion
from at_extensions.analysis.collapse import CatastrophicOverfitting, catastrophic_overfitting
from at_extensions.analysis.criticality import LayerCriticality, layer_criticality
from at_extensions.analysis.curvature import InputCurvature, input_curvature
from at_extensions.analysis.diffusion import effective_lr, gradient_noise, matched_lr
from at_extensions.analysis.dispersion import Dispersion, local_dispersion
from at_extensions.analysis.gradient_stability import GradientInstability, gradient_instability
from at_extensions.analysis.ntk import (
    KernelEvolution,
    NTKCost,
    effective_rank,
    empirical_ntk,
    kernel_distance,
    kernel_evolution,
    kernel_specialization,
    kernel_target_alignment,
    measure_kernels,
    ntk_cost,
    top_eigenvalue_mass,
)
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
    "KernelEvolution",
    "LabelAgreement",
    "LayerCriticality",
    "NTKCost",
    "RobustOverfitting",
    "catastrophic_overfitting",
    "diffusion",
    "effective_lr",
    "effective_rank",
    "empirical_ntk",
    "gradient_instability",
    "gradient_noise",
    "input_curvature",
    "kernel_distance",
    "kernel_evolution",
    "kernel_specialization",
    "kernel_target_alignment",
    "label_agreement",
    "layer_criticality",
    "local_dispersion",
    "matched_lr",
    "measure_kernels",
    "ntk_cost",
    "robust_overfitting",
    "top_eigenvalue_mass",
]
