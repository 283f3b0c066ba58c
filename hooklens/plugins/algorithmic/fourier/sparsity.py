"""How sparse a spectrum is: the Gini coefficient and the inverse participation ratio."""

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.precision import widened


def gini(values: Float[Tensor, "*lead entry"]) -> Float[Tensor, "*lead"]:
    """The Gini coefficient of absolute values: 0 if all are equal, 1 - 1/n if one of n is not zero; NaN if none is.

    With the values in increasing order, G = 1 - 2 sum_k (c_k / |c|_1) (n - k + 1/2) / n.

    >>> gini(torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 5.0, 0.0]])).tolist()
    [0.0, 0.75]

    Reference: Hurley and Rickard (2009), "Comparing Measures of Sparsity", definition of the Gini index; Nanda et al.
    (2023), "Progress measures for grokking via mechanistic interpretability", take it of the norms of the Fourier
    components of W_E and W_L.
    """
    ordered = widened(values).abs().sort(-1).values
    n = ordered.shape[-1]
    rank = torch.arange(1, n + 1, device=values.device, dtype=ordered.dtype)
    return 1 - 2 * (ordered / ordered.sum(-1, keepdim=True) * (n - rank + 0.5) / n).sum(-1)


def inverse_participation_ratio(values: Float[Tensor, "*lead entry"]) -> Float[Tensor, "*lead"]:
    """(|c|_4 / |c|_2)^4: 1 if one entry is not zero, 1/n if all n are equal.

    >>> inverse_participation_ratio(torch.tensor([[2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 5.0, 0.0]])).tolist()
    [0.25, 1.0]

    Reference: Gromov (2023), "Grokking modular arithmetic", equation 20 with r = 2; Doshi et al. (2024), "To grok or
    not to grok", equation 3. Both take it of the Fourier transform of a neuron's weights, and average over neurons.
    """
    values = widened(values)
    largest = values.abs().amax(-1, keepdim=True)
    squares = (values / largest).square()  # of very small and very large values, fourth powers are 0 or infinite
    return squares.square().sum(-1) / squares.sum(-1).square()
