"""Intervals, p-values and splits over prompts; the unit is a group of prompts that share something."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError

Ends = tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]
Groups = Int[Tensor, "pair"] | None
_CELLS = 4096  # 2,000 draws of 36,864 neurons would not fit


def mean_interval(
    values: Float[Tensor, "pair *cell"], *, group: Groups = None, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Ends:
    """Percentile interval of the mean over pairs, by resampling pairs, or whole groups of them.

    >>> low, high = mean_interval(torch.tensor([1.0, 1.0, 1.0]))
    >>> float(low), float(high)
    (1.0, 1.0)

    Reference: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3.
    """
    ones = torch.ones(len(values), dtype=values.dtype, device=values.device)
    return ratio_interval(values, ones, group=group, level=level, draws=draws, seed=seed)


def ratio_interval(
    numerator: Float[Tensor, "pair *cell"],
    denominator: Float[Tensor, "pair"],
    *,
    group: Groups = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Ends:
    """Percentile interval of mean(numerator) / mean(denominator), both means recomputed on every resample.

    >>> low, high = ratio_interval(torch.ones(8, 1), torch.full((8,), 2.0))
    >>> float(low[0]), float(high[0])
    (0.5, 0.5)

    With `group`, whole groups are drawn (a cluster bootstrap): pairs that share names are not independent.
    Reference: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3.
    """
    weight = _weights(group_numbers(len(denominator), group), draws, seed).to(numerator)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=numerator.dtype, device=numerator.device)
    bottom = weight @ denominator
    flat = numerator.reshape(len(numerator), -1)
    found = [torch.quantile((weight @ cells) / bottom[:, None], ends, dim=0) for cells in flat.split(_CELLS, dim=1)]
    low, high = torch.cat(found, dim=1).view(2, *numerator.shape[1:])
    return low, high


def sign_flip_p(
    values: Float[Tensor, "pair *cell"], *, group: Groups = None, draws: int = 4096, seed: int = 0
) -> Float[Tensor, "*cell"]:
    """Two-sided p-value of "the mean is 0", from flipping the sign of each group's values at random.

    Exact where there are at most 12 groups (every pattern of signs is tried), so that its smallest value is 2 / 2^n.

    >>> sign_flip_p(torch.tensor([1.0, 1.0, 1.0, 1.0])).item()
    0.125

    Reference: Fisher (1935), "The Design of Experiments", section 21.
    """
    number = group_numbers(len(values), group)
    n = int(number.max()) + 1
    wide = values.double()  # in float32 rounding would lose the pattern that was seen among those tried
    sums = wide.new_zeros(n, *wide.shape[1:]).index_add_(0, number.to(wide.device), wide).reshape(n, -1)
    if n <= 12:
        signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * n).reshape(-1, n)
        extra = 0
    else:
        signs = torch.randint(2, (draws, n), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        extra = 1  # what was seen is one of the patterns
    hits = []
    for cells in sums.split(max(1, _CELLS * 4096 // len(signs)), dim=1):
        seen, slack = cells.sum(0).abs(), 1e-9 * cells.abs().sum(0)
        hits.append(((signs.to(cells) @ cells).abs() >= seen - slack).sum(0))
    return ((torch.cat(hits) + extra) / (len(signs) + extra)).to(values).view(values.shape[1:])


def null_p(value: Float[Tensor, "*cell"], null: Float[Tensor, "draw *cell"]) -> Float[Tensor, "*cell"]:
    """How often a draw from the null reaches the value, the value itself counted in: never 0.

    >>> null_p(torch.tensor(5.0), torch.tensor([1.0, 2.0, 6.0])).item()
    0.5

    Reference: Davison and Hinkley (1997), "Bootstrap Methods and their Application", section 4.2.
    """
    return ((null >= value).sum(0) + 1).to(value) / (len(null) + 1)


def q_values(p: Float[Tensor, "*cell"]) -> Float[Tensor, "*cell"]:
    """Benjamini-Hochberg: the false discovery rate at which each of a family of tests would be called; NaN stays out.

    >>> q_values(torch.tensor([0.01, 0.02, 0.03, 0.5])).tolist()
    [0.0399..., 0.0399..., 0.0399..., 0.5]

    Reference: Benjamini and Hochberg (1995), "Controlling the False Discovery Rate", equation 1.
    """
    flat = p.flatten()
    known = (~flat.isnan()).nonzero().flatten()
    order = known[flat[known].argsort(stable=True)]
    n = len(order)
    scaled = flat[order] * n / torch.arange(1, n + 1, device=p.device).to(p)
    q = torch.full_like(flat, float("nan"))
    q[order] = scaled.flip(0).cummin(0).values.flip(0).clamp_max(1.0) if n else scaled
    return q.view_as(p)


def halves(n: int, *, group: Groups = None, seed: int = 0) -> tuple[Int[Tensor, "chosen"], Int[Tensor, "reported"]]:
    """Two disjoint halves of the pairs, no group in both: one to choose on, one to report on.

    >>> choose, report = halves(4, group=torch.tensor([0, 0, 1, 1]))
    >>> sorted([choose.tolist(), report.tolist()])
    [[0, 1], [2, 3]]
    """
    number = group_numbers(n, group)
    n_groups = int(number.max()) + 1
    if n_groups < 2:
        raise InputError(f"two halves need at least two independent groups of prompts, got {n_groups}")
    order = torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed))
    first = torch.isin(number, order[: n_groups // 2])
    return first.nonzero().flatten(), (~first).nonzero().flatten()


def group_numbers(n: int, group: Groups) -> Int[Tensor, "pair"]:
    """Groups counted from 0 in order of their label; every pair its own where none are given.

    >>> group_numbers(3, torch.tensor([7, 4, 7])).tolist()
    [1, 0, 1]
    """
    if group is None:
        return torch.arange(n)
    if len(group) != n:
        raise InputError(f"group has one label a pair, got {len(group)} labels for {n} pairs")
    return torch.as_tensor(group).cpu().unique(return_inverse=True)[1]


def _weights(number: Int[Tensor, "pair"], draws: int, seed: int) -> Float[Tensor, "draw pair"]:
    """How often each draw holds each pair; groups of unequal size weigh as many pairs as they have."""
    n = int(number.max()) + 1
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(draws, n, dtype=torch.float64)
    )
    weight = counts[:, number]
    return weight / weight.sum(1, keepdim=True)


def correlation(a: Float[Tensor, "cell"], b: Float[Tensor, "cell"]) -> Float[Tensor, ""]:
    """Pearson's correlation; NaN where either is constant or there is one cell.

    >>> round(correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])).item(), 6)
    1.0
    """
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def rank_correlation(a: Float[Tensor, "cell"], b: Float[Tensor, "cell"]) -> Float[Tensor, ""]:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where either is constant.

    >>> round(rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 5.0, 6.0])).item(), 6)
    1.0

    Reference: Spearman (1904), "The Proof and Measurement of Association between Two Things".
    """
    return correlation(_ranks(a), _ranks(b))


def _ranks(x: Float[Tensor, "cell"]) -> Float[Tensor, "cell"]:
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place].to(x)
