"""Analysis of weights: spectra, the tokens that singular directions and neurons read and write, and composition."""

from hooklens.plugins.weights.angles import PrincipalAngles, principal_angles
from hooklens.plugins.weights.neurons import NeuronTokens, neuron_tokens
from hooklens.plugins.weights.overlap import Overlap, overlap
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
    numerical_rank,
    participation_ratio,
    spectrum,
)
from hooklens.plugins.weights.token_lists import TokenLists

__all__ = [
    "NeuronTokens",
    "Overlap",
    "PrincipalAngles",
    "SingularDirections",
    "Spectra",
    "Spectrum",
    "TokenLists",
    "effective_rank",
    "mlp_read_directions",
    "mlp_write_directions",
    "neuron_tokens",
    "numerical_rank",
    "ov_directions",
    "overlap",
    "participation_ratio",
    "principal_angles",
    "qk_directions",
    "spectrum",
]
