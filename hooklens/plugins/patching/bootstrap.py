"""Intervals of a ratio of means, by resampling pairs."""

import torch
from jaxtyping import Float
from torch import Tensor


def ratio_interval(
    numerator: Float[Tensor, "pair cell"],
    denominator: Float[Tensor, "pair"],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[Float[Tensor, "cell"], Float[Tensor, "cell"]]:
    """Percentile interval of mean(numerator) / mean(denominator), both means recomputed on every resample of the pairs.

    >>> low, high = ratio_interval(torch.ones(8, 1), torch.full((8,), 2.0))
    >>> float(low[0]), float(high[0])
    (0.5, 0.5)

    Reference: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3.
    """
    n = len(denominator)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (draws, n), generator=generator)
    weight = torch.zeros(draws, n, dtype=numerator.dtype).scatter_add_(
        1, drawn, torch.ones(draws, n, dtype=numerator.dtype)
    )
    weight = weight.to(numerator.device) / n
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=numerator.dtype, device=numerator.device)
    bottom = weight @ denominator
    found = []
    for cells in numerator.split(4096, dim=1):  # 2,000 draws of 36,864 neurons would not fit
        found.append(torch.quantile((weight @ cells) / bottom[:, None], ends, dim=0))
    low, high = torch.cat(found, dim=1)
    return low, high
