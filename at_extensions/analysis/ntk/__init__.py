"""The empirical neural tangent kernel, its cost, and measures of kernels."""

from at_extensions.analysis.ntk.cost import LayerCost, NTKCost, ntk_cost
from at_extensions.analysis.ntk.evolution import KernelEvolution, kernel_evolution, measure_kernels
from at_extensions.analysis.ntk.kernel import empirical_ntk
from at_extensions.analysis.ntk.measures import (
    effective_rank,
    kernel_distance,
    kernel_specialization,
    kernel_target_alignment,
    top_eigenvalue_mass,
)

__all__ = [
    "KernelEvolution",
    "LayerCost",
    "NTKCost",
    "effective_rank",
    "empirical_ntk",
    "kernel_distance",
    "kernel_evolution",
    "kernel_specialization",
    "kernel_target_alignment",
    "measure_kernels",
    "ntk_cost",
    "top_eigenvalue_mass",
]
