"""Analysis of weights: spectra, the tokens that singular directions and neurons read and write, and composition."""

from hooklens.plugins.weights.angles import PrincipalAngles, measure_angles
from hooklens.plugins.weights.neurons import NeuronTokens, read_neurons
from hooklens.plugins.weights.overlap import Overlap, measure_overlap
from hooklens.plugins.weights.ranked_tokens import TokenLists
from hooklens.plugins.weights.singular_directions import (
    SingularDirections,
    mlp_read_directions,
    mlp_write_directions,
    ov_directions,
    qk_directions,
)
from hooklens.plugins.weights.spectrum import (
    Spectra,
    Spectrum,
    effective_rank,
    measure_spectrum,
    numerical_rank,
    participation_ratio,
)

__all__ = [
    "NeuronTokens",
    "Overlap",
    "PrincipalAngles",
    "SingularDirections",
    "Spectra",
    "Spectrum",
    "TokenLists",
    "effective_rank",
    "measure_angles",
    "measure_overlap",
    "measure_spectrum",
    "mlp_read_directions",
    "mlp_write_directions",
    "numerical_rank",
    "ov_directions",
    "participation_ratio",
    "qk_directions",
    "read_neurons",
]
