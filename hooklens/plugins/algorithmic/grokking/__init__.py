"""Grokking as seen in a run: when it happened, what the weight norm did, and where in the table it generalised."""

from hooklens.plugins.algorithmic.grokking.grokking_step import GrokkingStep, find_grokking
from hooklens.plugins.algorithmic.grokking.modular_recipes import control_recipes, fast_recipe, grokking_recipe
from hooklens.plugins.algorithmic.grokking.norm_drop import NormDrops, compare_norm_drops, squared_weights
from hooklens.plugins.algorithmic.grokking.phases import Phases, find_phases
from hooklens.plugins.algorithmic.grokking.table_regions import TableRegions, binomial_interval, measure_regions

__all__ = [
    "GrokkingStep",
    "NormDrops",
    "Phases",
    "TableRegions",
    "binomial_interval",
    "compare_norm_drops",
    "control_recipes",
    "fast_recipe",
    "find_grokking",
    "find_phases",
    "grokking_recipe",
    "measure_regions",
    "squared_weights",
]
