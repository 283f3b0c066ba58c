"""Which pairs stand out after removing the mean of their writer and of their reader?"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Pairs = Float[Tensor, "layer head reader_layer reader_head"]
LEAST_PARTNERS = 5  # with fewer, a pair is a large part of its own writer's mean
_LEAST_CELLS = 20  # needed at one layer distance to estimate a separate spread
_EFFICIENCY = 0.37  # of the median absolute deviation, relative to the standard deviation
_SWEEPS = 30


def standing_out(scores: Pairs, is_pair: Bool[Tensor, "layer head reader_layer reader_head"]) -> tuple[Pairs, Pairs]:
    """How far each pair lies above writer, reader and layer distance, in robust deviations; and its one-sided p.

    Logarithms of scores are fitted by one level per writer and one per reader. The residuals are centred and scaled by
    median and absolute deviation among pairs of the same layer distance. This scale is itself uncertain, so p comes
    from Student's t with the degrees of freedom of the scale: with few heads a normal tail would call pairs of random
    weights significant (in one model in four, with 3 layers of 6 heads). A pair with score 0 has p = 1.

    >>> scores = torch.rand(2, 6, 2, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    >>> scores[0, 2, 1, 3] = 20.0
    >>> pair = torch.zeros(2, 6, 2, 6, dtype=torch.bool); pair[0, :, 1] = True
    >>> z, p = standing_out(scores, pair)
    >>> bool(z[0, 2, 1, 3] == z.nan_to_num(-9).max()), bool(p[0, 2, 1, 3] < 0.001)
    (True, True)

    Reference: Rousseeuw and Croux (1993), "Alternatives to the Median Absolute Deviation", table 1 (its efficiency).
    """
    layer = torch.arange(len(scores), device=scores.device)
    distance = (layer - layer[:, None])[:, None, :, None].expand_as(scores).flatten(2).flatten(0, 1)
    flat, pair = (x.flatten(2).flatten(0, 1) for x in (scores.double(), is_pair))
    usable = pair & (flat > 0)
    left = torch.where(usable, flat.log(), torch.nan)
    for _ in range(_SWEEPS):  # pairs exist for later readers only, so the two levels are not orthogonal
        for axis in (1, 0):
            left = left - left.nanmean(axis, keepdim=True).nan_to_num()
    partners = 1 - 1 / torch.stack([usable.sum(1, keepdim=True).expand_as(flat), usable.sum(0).expand_as(flat)])
    left = left / partners.prod(0).clamp_min(0.1).sqrt()  # a fit to few partners leaves smaller residuals
    z, df, every = torch.full_like(left, torch.nan), torch.ones_like(left), _robust(left[usable])
    free = 1 - (usable.any(0).sum() + usable.any(1).sum() - 1) / usable.sum()  # degrees of freedom left per cell
    for layers_apart in distance[usable].unique():
        at = usable & (distance == layers_apart)
        alone = int(at.sum()) >= _LEAST_CELLS
        middle, spread = _robust(left[at]) if alone else every
        z[at] = (left[at] - middle) / spread
        df[at] = (_EFFICIENCY * free * (at if alone else usable).sum()).clamp_min(1).to(df)
    p = torch.where(usable, _t_tail(z, df), torch.where(pair, 1.0, torch.nan))
    return z.view(scores.shape).to(scores), p.view(scores.shape).double()


def _t_tail(t: Float[Tensor, "*cell"], df: Float[Tensor, "*cell"]) -> Float[Tensor, "*cell"]:
    """The upper tail of Student's t: within 5 % down to 1e-4 from 5 degrees of freedom on, too large farther out.

    >>> _t_tail(torch.tensor(2.262), torch.tensor(9.0)).item()
    0.025...

    Reference: Wallace (1959), "Bounds on Normal Approximations to Student's and the Chi-Square Distributions".
    """
    z = (8 * df + 1) / (8 * df + 3) * (df * torch.log1p(t.square() / df)).sqrt()
    return torch.special.ndtr(-t.sign() * z)


def _robust(x: Float[Tensor, "cell"]) -> tuple[Tensor, Tensor]:
    """Median, and the deviation that a normal distribution with this median absolute deviation has."""
    if not len(x):
        return x.new_tensor(0.0), x.new_tensor(torch.nan)
    middle = x.median()
    spread = 1.4826 * (x - middle).abs().median()
    return middle, torch.where(spread > 0, spread, torch.nan)
