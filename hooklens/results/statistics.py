"""Intervals, p-values and splits over prompts; the independent unit is a group of related prompts."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import ArgumentError, InputError
from hooklens.core.precision import widened

Ends = tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]
Groups = Int[Tensor, "pair"] | None
PValues = Float64[Tensor, "*cell"]  # in float32 1/20 lies above 0.05
DRAWS = 2000  # resamples: the Monte Carlo error of an end of a 95 % interval is then 3 % of half its width
FLIPS = 4096  # patterns of signs: as many as 12 groups have, which are tried one and all
#: The meaning of an interval's columns, for the `terms` of a table.
INTERVAL_TERMS = {"95% low": "lower end of its interval over groups", "95% high": "upper end of that interval"}
LEAST_GROUPS = 6  # with fewer, intervals cover less than they say and no p of sign flips reaches 0.05
_COVERAGE = {2: 50, 3: 75, 4: 87, 5: 91}  # of a mean of so many normal values, in percent
_CELLS = 4096  # 2,000 draws of 36,864 neurons would not fit


def mean_interval(
    values: Float[Tensor, "pair *cell"], *, group: Groups = None, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Ends:
    """Bootstrap interval of the mean over pairs; resamples pairs, or whole groups of pairs (see `ratio_interval`).

    >>> low, high = mean_interval(torch.tensor([1.0, 1.0, 1.0]))
    >>> float(low), float(high)
    (1.0, 1.0)
    """
    ones = torch.ones(len(values), dtype=values.dtype, device=values.device)
    return ratio_interval(values, ones, group=group, level=level, draws=draws, seed=seed)


def ratio_interval(
    numerator: Float[Tensor, "pair *cell"],
    denominator: Float[Tensor, "pair"],
    *,
    group: Groups = None,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Ends:
    """Bootstrap interval of mean(numerator) / mean(denominator), both means recomputed on every resample.

    >>> low, high = ratio_interval(torch.ones(8, 1), torch.full((8,), 2.0))
    >>> float(low[0]), float(high[0])
    (0.5, 0.5)

    With `group`, whole groups are resampled (a cluster bootstrap), because pairs that share names are not independent.
    NaN for one group. Resamples of few groups vary too little, so more extreme percentiles are used, according to
    Student's t and the lost degree of freedom. No resample leaves the range of the groups' means: with fewer than 6
    groups this range is almost the interval, and the coverage is below 0.95.

    Reference: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3; Hesterberg (2015), "What
    Teachers Should Know About the Bootstrap", section 4 (expanded percentiles).
    """
    _check_level(level)
    number, numerator, denominator = group_numbers(len(denominator), group), widened(numerator), widened(denominator)
    if int(number.max()) < 1:
        return _no_interval(numerator)
    weight = _counts(int(number.max()) + 1, draws, seed)[:, number]  # how often each draw contains each pair
    weight = (weight / weight.sum(1, keepdim=True)).to(numerator)
    tail, bottom = _tail(number, level), (weight @ denominator)[:, None]
    return _ends_of(numerator, lambda cells: quantiles((weight @ cells) / bottom, (tail, 1 - tail)))


def studentised_interval(
    values: Float[Tensor, "pair *cell"], *, group: Groups = None, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Ends:
    """Bootstrap interval of the mean over pairs that accounts for the skew of the values: the bootstrap-t interval.

    A resample of skewed values with a low mean also has a small spread, and so a t far from 0: the interval extends
    further to the side where large values may have been missed. Resamples without spread are left out. NaN for one
    group, and for two, whose resamples with spread are all alike.

    >>> skewed = torch.tensor([0.1, 0.2, 0.1, 0.3, 0.2, 0.1, 0.2, 2.0])
    >>> above = mean_interval(skewed)[1], studentised_interval(skewed)[1]
    >>> bool(above[1] > above[0])
    True

    Reference: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", section 12.5; Cameron, Gelbach and
    Miller (2008), "Bootstrap-Based Improvements for Inference with Clustered Errors", for groups.
    """
    _check_level(level)
    number, wide = group_numbers(len(values), group), widened(values).double()
    n = int(number.max()) + 1
    if n < 3:
        return _no_interval(widened(values))
    size, tail = number.bincount().to(wide), (1 - level) / 2
    counts, shares = _counts(n, draws, seed).to(wide), wide.new_tensor([1 - tail, tail])

    def ends(cells: Float[Tensor, "pair cell"]) -> Float[Tensor, "2 cell"]:
        sums = wide.new_zeros(n, cells.shape[1]).index_add_(0, number.to(wide.device), cells)
        centre, error = _mean_and_error(torch.ones_like(size)[None], sums, size)
        off, own = _mean_and_error(counts, sums - centre * size[:, None], size)
        # a resample with copies of a single value has only rounding error, and no t
        t = torch.where(own > 1e-6 * error, off / own, torch.nan)
        reach = torch.nanquantile(t, shares, dim=0, interpolation="nearest")
        return centre - torch.where(error > 0, reach * error, 0.0)

    low, high = _ends_of(wide, ends)
    return low.to(widened(values)), high.to(widened(values))


def _no_interval(values: Float[Tensor, "pair *cell"]) -> Ends:
    return torch.full_like(values[0], torch.nan), torch.full_like(values[0], torch.nan)


def _ends_of(values: Float[Tensor, "pair *cell"], ends: Callable[[Tensor], Tensor]) -> Ends:
    """Both ends for every cell, computed for a limited number of cells at a time."""
    flat = values.reshape(len(values), -1)
    low, high = torch.cat([ends(cells) for cells in flat.split(_CELLS, dim=1)], dim=1).view(2, *values.shape[1:])
    return low, high


def _mean_and_error(
    counts: Float[Tensor, "draw group"], sums: Float[Tensor, "group cell"], size: Float[Tensor, "group"]
) -> tuple[Float[Tensor, "draw cell"], Float[Tensor, "draw cell"]]:
    """The mean over pairs of each bootstrap draw of groups, and its standard error for groups of unequal size."""
    n, total = len(size), (counts @ size)[:, None]
    mean = counts @ sums / total
    crossed, squares = counts @ (sums * size[:, None]), (counts @ size.square())[:, None]
    left = (counts @ sums.square() - 2 * mean * crossed + mean.square() * squares).clamp_min(0)
    return mean, (left * n / (n - 1)).sqrt() / total


def few_groups(n: int, before: str = "") -> str:
    """The note for a 95 % interval over fewer than 6 groups, after `before`; empty from 6 groups on.

    >>> few_groups(3), few_groups(6)
    ('few groups: 95 % intervals of 3 cover about 75 %', '')

    For normal values. With up to 4 groups the interval is their range, which misses if all lie on one side: 2 / 2^n.
    """
    if n >= LEAST_GROUPS:
        return ""
    if n < 2:
        return f"{before}one group has no interval"
    return f"{before}few groups: 95 % intervals of {n} cover about {_COVERAGE[n]} %"


def _check_level(level: float) -> None:
    if not isinstance(level, int | float) or not 0 < level < 1:
        raise ArgumentError(
            "{level} is the share of cases that an interval covers, between 0 and 1 (0.95: 95 %), got {0}", level
        )


def _tail(number: Int[Tensor, "pair"], level: float) -> float:
    """The share of resamples left out at each end: the tail of a normal beyond t * sqrt(n / (n - 1)).

    n is the number of equal groups; unequal ones count less: (sum of sizes)^2 / sum of squared sizes. The quantile of
    Student's t is Abramowitz and Stegun (1964), 26.7.5: accurate to 1 % from 4 degrees of freedom on; below that no
    resample reaches the quantile anyway.
    """
    size = number.bincount().double()
    df = max(float(size.sum() ** 2 / size.square().sum()) - 1, 1.0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    t = z + sum(term / df**power for power, term in enumerate(terms, 1))
    return NormalDist().cdf(-t * math.sqrt((df + 1) / df))


def sign_flip_p(
    values: Float[Tensor, "pair *cell"], *, group: Groups = None, draws: int = FLIPS, seed: int = 0
) -> PValues:
    """Two-sided p-value of "the mean is 0", from random sign flips of each group's values.

    Exact for at most 12 groups (all sign patterns are used), so its smallest value is 2 / 2^n. NaN if any value is NaN.

    >>> sign_flip_p(torch.tensor([1.0, 1.0, 1.0, 1.0])).item()
    0.125

    Reference: Fisher (1935), "The Design of Experiments", section 21.
    """
    number = group_numbers(len(values), group)
    n = int(number.max()) + 1
    wide = values.double()  # in float32 rounding could lose the observed pattern among those tried
    sums = wide.new_zeros(n, *wide.shape[1:]).index_add_(0, number.to(wide.device), wide).reshape(n, -1)
    if n <= 12:
        signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * n).reshape(-1, n)
        extra = 0
    else:
        signs = torch.randint(2, (draws, n), generator=seeded(seed)) * 2.0 - 1
        extra = 1  # the observed values are one of the patterns
    hits = []
    for cells in sums.split(max(1, _CELLS * 4096 // len(signs)), dim=1):
        seen, slack = cells.sum(0).abs(), 1e-9 * cells.abs().sum(0)
        hits.append(((signs.to(cells) @ cells).abs() >= seen - slack).sum(0))
    p = (torch.cat(hits) + extra).double() / (len(signs) + extra)
    return p.masked_fill(sums.isnan().any(0), torch.nan).view(values.shape[1:])


def quantiles(values: Float[Tensor, "draw *cell"], shares: Sequence[float]) -> Float[Tensor, "share *cell"]:
    """The values below which these shares of the draws lie: torch.quantile with shares of the draws' device and dtype.

    >>> quantiles(torch.tensor([3.0, 1.0, 2.0]), (0.0, 0.5)).tolist()
    [1.0, 2.0]
    """
    return torch.quantile(values, values.new_tensor(shares), dim=0)


def middle(draws: Float[Tensor, "draw *cell"], level: float = 0.95) -> Ends:
    """The ends between which the middle `level` of the draws lies.

    >>> [end.item() for end in middle(torch.arange(101.0), 0.9)]
    [5.0, 95.0]
    """
    low, high = quantiles(draws, ((1 - level) / 2, (1 + level) / 2))
    return low, high


def null_p(value: Float[Tensor, "*cell"], null: Float[Tensor, "draw *cell"]) -> PValues:
    """How often does a draw from the null reach the value? The value itself counts: never 0. NaN if any value is NaN.

    >>> null_p(torch.tensor(5.0), torch.tensor([1.0, 2.0, 6.0])).item()
    0.5

    Reference: Davison and Hinkley (1997), "Bootstrap Methods and their Application", section 4.2.
    """
    p = ((null >= value).sum(0) + 1).double() / (len(null) + 1)
    return torch.where(value.isnan() | null.isnan().any(0), torch.nan, p)


def q_values(p: Float[Tensor, "*cell"]) -> PValues:
    """Benjamini-Hochberg: the false discovery rate at which each test of a family is significant; NaN is left out.

    >>> q_values(torch.tensor([0.01, 0.02, 0.03, 0.5], dtype=torch.float64)).tolist()
    [0.04, 0.04, 0.04, 0.5]

    Reference: Benjamini and Hochberg (1995), "Controlling the False Discovery Rate", equation 1.
    """
    flat = p.double().flatten()
    known = (~flat.isnan()).nonzero().flatten()
    order = known[flat[known].argsort(stable=True)]
    n = len(order)
    scaled = flat[order] * n / torch.arange(1, n + 1, device=p.device)
    q = torch.full_like(flat, float("nan"))
    q[order] = scaled.flip(0).cummin(0).values.flip(0).clamp_max(1.0) if n else scaled
    return q.view_as(p)


class Tested:
    """A mixin for results with a `p` of several tests."""

    p: Any

    @property
    def q(self) -> PValues:
        """`p` as false discovery rates over all tests of this result; `q_values` corrects over several results."""
        return q_values(self.p)


def halves(n: int, *, group: Groups = None, seed: int = 0) -> tuple[Int[Tensor, "chosen"], Int[Tensor, "reported"]]:
    """Two disjoint halves of the pairs with no common group: one to choose on, one to report on.

    >>> choose, report = halves(4, group=torch.tensor([0, 0, 1, 1]))
    >>> sorted([choose.tolist(), report.tolist()])
    [[0, 1], [2, 3]]
    """
    number = group_numbers(n, group)
    n_groups = int(number.max()) + 1
    if n_groups < 2:
        raise InputError(f"two halves need at least two independent groups of prompts, got {n_groups}")
    order = torch.randperm(n_groups, generator=seeded(seed))
    first = torch.isin(number, order[: n_groups // 2])
    return first.nonzero().flatten(), (~first).nonzero().flatten()


def group_numbers(n: int, group: Groups) -> Int[Tensor, "pair"]:
    """Number the groups from 0 in order of their labels; by default every pair is its own group.

    >>> group_numbers(3, torch.tensor([7, 4, 7])).tolist()
    [1, 0, 1]
    """
    if group is None:
        return torch.arange(n)
    if len(group) != n:
        raise InputError(f"group needs one label per pair, got {len(group)} labels for {n} pairs")
    return torch.as_tensor(group).cpu().unique(return_inverse=True)[1]


def _counts(n: int, draws: int, seed: int) -> Float[Tensor, "draw group"]:
    """How often each draw contains each group."""
    drawn = torch.randint(n, (draws, n), generator=seeded(seed))
    return torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(draws, n, dtype=torch.float64))


def correlation(a: Float[Tensor, "cell"], b: Float[Tensor, "cell"]) -> Float[Tensor, ""]:
    """Pearson's correlation; NaN if either is constant or there is only one cell.

    >>> round(correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])).item(), 6)
    1.0
    """
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def rank_correlation(a: Float[Tensor, "cell"], b: Float[Tensor, "cell"]) -> Float[Tensor, ""]:
    """Spearman's rank correlation with mean ranks for ties; NaN if either is constant.

    >>> round(rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 5.0, 6.0])).item(), 6)
    1.0

    Reference: Spearman (1904), "The Proof and Measurement of Association between Two Things".
    """
    return correlation(_ranks(a), _ranks(b))


def _ranks(x: Float[Tensor, "cell"]) -> Float[Tensor, "cell"]:
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place].to(x)


def auc(values: Float[Tensor, "*cell row"], positive: Bool[Tensor, "row"]) -> Float[Tensor, "*cell"]:
    """How often a positive row has the larger value, with ties counting half.

    >>> auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])).item()
    0.75

    Reference: Mann and Whitney (1947); Hanley and McNeil (1982), "The meaning and use of the area under a receiver
    operating characteristic", for the equality with that area.
    """
    positives, ordered = values[..., positive].contiguous(), values[..., ~positive].sort(-1).values
    below, up_to = (torch.searchsorted(ordered, positives, right=right) for right in (False, True))
    return ((below + up_to).to(values.dtype) / 2).mean(-1) / ordered.shape[-1]
