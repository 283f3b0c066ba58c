"""Fourier analysis of modular addition: plain functions on weights, activations and logits of any such model."""

from hooklens.plugins.algorithmic.fourier.basis import (
    component_frequencies,
    component_names,
    distinguished,
    fourier_basis,
    frequency_power,
    frequency_power_2d,
    inverse_2d,
    keep_frequencies,
    keep_single_frequencies,
    mean_by_sum,
    sums,
    transform,
    transform_2d,
)
from hooklens.plugins.algorithmic.fourier.circles import Circles, project_embedding
from hooklens.plugins.algorithmic.fourier.frequency_ablation import (
    FrequencyAblation,
    ablate_logit_frequencies,
    ablate_neuron_frequencies,
)
from hooklens.plugins.algorithmic.fourier.frequency_sets import SmallestSet, find_smallest_set
from hooklens.plugins.algorithmic.fourier.key_frequencies import KeyFrequencies, find_key_frequencies
from hooklens.plugins.algorithmic.fourier.logit_formula import (
    LogitFormula,
    fit_logit_formula,
    formula_coefficients,
    formula_logits,
    logit_similarity,
)
from hooklens.plugins.algorithmic.fourier.neuron_frequencies import (
    NeuronFrequencies,
    classify_neurons,
    explain_by_frequency,
    explain_by_sum,
)
from hooklens.plugins.algorithmic.fourier.neuron_patching import NeuronPatching, patch_neurons, random_pairs
from hooklens.plugins.algorithmic.fourier.pair_table import PairTable, Task, cross_entropy, run_pairs, tabulate
from hooklens.plugins.algorithmic.fourier.plane_spectrum import PlaneSpectrum, measure_plane_spectrum
from hooklens.plugins.algorithmic.fourier.progress_measures import (
    Progress,
    excluded_logits,
    excluded_loss,
    measure_progress,
    restricted_logits,
    restricted_loss,
    task_of,
)
from hooklens.plugins.algorithmic.fourier.sparsity import gini, inverse_participation_ratio
from hooklens.plugins.algorithmic.fourier.sum_directions import SumDirections, read_sum_directions
from hooklens.plugins.algorithmic.fourier.weight_spectra import (
    FourierSpectrum,
    measure_fourier_spectrum,
    neuron_logit_map,
)

__all__ = [
    "Circles",
    "FourierSpectrum",
    "FrequencyAblation",
    "KeyFrequencies",
    "LogitFormula",
    "NeuronFrequencies",
    "NeuronPatching",
    "PairTable",
    "PlaneSpectrum",
    "Progress",
    "SmallestSet",
    "SumDirections",
    "Task",
    "ablate_logit_frequencies",
    "ablate_neuron_frequencies",
    "classify_neurons",
    "component_frequencies",
    "component_names",
    "cross_entropy",
    "distinguished",
    "excluded_logits",
    "excluded_loss",
    "explain_by_frequency",
    "explain_by_sum",
    "find_key_frequencies",
    "find_smallest_set",
    "fit_logit_formula",
    "formula_coefficients",
    "formula_logits",
    "fourier_basis",
    "frequency_power",
    "frequency_power_2d",
    "gini",
    "inverse_2d",
    "inverse_participation_ratio",
    "keep_frequencies",
    "keep_single_frequencies",
    "logit_similarity",
    "mean_by_sum",
    "measure_fourier_spectrum",
    "measure_plane_spectrum",
    "measure_progress",
    "neuron_logit_map",
    "patch_neurons",
    "project_embedding",
    "random_pairs",
    "read_sum_directions",
    "restricted_logits",
    "restricted_loss",
    "run_pairs",
    "sums",
    "tabulate",
    "task_of",
    "transform",
    "transform_2d",
]
