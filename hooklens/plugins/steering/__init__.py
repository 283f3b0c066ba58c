"""Steering: add contrast directions to the residual stream or ablate them, and measure the cost in fluency."""

from hooklens.plugins.steering.coefficient_result import CoefficientSweep
from hooklens.plugins.steering.coefficients import SweepSettings, sweep_coefficients
from hooklens.plugins.steering.contrast import ContrastDirections, find_direction
from hooklens.plugins.steering.direction_ablation import DirectionAblation, measure_direction_ablation
from hooklens.plugins.steering.steering_edit import StreamEdit, ablate_direction, project_out, steer

__all__ = [
    "CoefficientSweep",
    "ContrastDirections",
    "DirectionAblation",
    "StreamEdit",
    "SweepSettings",
    "ablate_direction",
    "find_direction",
    "measure_direction_ablation",
    "project_out",
    "steer",
    "sweep_coefficients",
]
