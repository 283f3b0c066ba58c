"""Steering: add contrast directions to the residual stream or ablate them, and measure the cost in fluency."""

from hooklens.plugins.steering.coefficient_result import CoefficientSweep
from hooklens.plugins.steering.coefficients import SweepSettings, coefficient_sweep
from hooklens.plugins.steering.contrast import ContrastDirections, contrast_direction
from hooklens.plugins.steering.direction_ablation import DirectionAblation, direction_ablation
from hooklens.plugins.steering.steer import StreamEdit, ablate_direction, project_out, steer

__all__ = [
    "CoefficientSweep",
    "ContrastDirections",
    "DirectionAblation",
    "StreamEdit",
    "SweepSettings",
    "ablate_direction",
    "coefficient_sweep",
    "contrast_direction",
    "direction_ablation",
    "project_out",
    "steer",
]
