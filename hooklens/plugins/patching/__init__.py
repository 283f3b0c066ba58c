"""Patching: what an activation, a path or a component carries, by writing another value there."""

from hooklens.plugins.patching.ablation import AblationSweep, ablate
from hooklens.plugins.patching.ablation_comparison import AblationComparison, compare_ablations
from hooklens.plugins.patching.activation import PatchSweep, patch
from hooklens.plugins.patching.attribution_patching import AttributionPatching, attribution_patch
from hooklens.plugins.patching.flow import Choice, InformationFlow
from hooklens.plugins.patching.information_flow import trace_information
from hooklens.plugins.patching.input_attribution import InputAttribution, gradient_x_input, integrated_gradients
from hooklens.plugins.patching.path import Fixed, PathSweep, path_patch
from hooklens.plugins.patching.weight_randomisation import WeightRandomisation
from hooklens.sweeps.nodes import At
from hooklens.sweeps.replacement import (
    Given,
    Mean,
    MeanOfOthers,
    MeanOverPositions,
    OtherRun,
    Replacement,
    Resample,
    Zero,
)

__all__ = [
    "AblationComparison",
    "AblationSweep",
    "At",
    "AttributionPatching",
    "Choice",
    "Fixed",
    "Given",
    "InformationFlow",
    "InputAttribution",
    "Mean",
    "MeanOfOthers",
    "MeanOverPositions",
    "OtherRun",
    "PatchSweep",
    "PathSweep",
    "Replacement",
    "Resample",
    "WeightRandomisation",
    "Zero",
    "ablate",
    "attribution_patch",
    "compare_ablations",
    "gradient_x_input",
    "integrated_gradients",
    "patch",
    "path_patch",
    "trace_information",
]
