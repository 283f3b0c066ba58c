"""Intervals cover, p-values are honest under the null, q-values are Benjamini and Hochberg's, halves share no group."""

import math

import pytest
import torch
from close import close
from hypothesis import given
from hypothesis import strategies as st
from refused import refused

from hooklens.core.errors import InputError
from hooklens.results.statistics import (
    correlation,
    few_groups,
    group_numbers,
    halves,
    mean_interval,
    null_p,
    q_values,
    rank_correlation,
    ratio_interval,
    sign_flip_p,
    studentised_interval,
)


def test_an_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 400, generator=generator) + 1  # 400 experiments of 40 pairs
    low, high = mean_interval(values, level=0.9)
    covered = ((low <= 1) & (high >= 1)).float().mean()
    assert 0.84 < covered < 0.94


@pytest.mark.parametrize(
    ("n", "sizes"), [(6, "equal"), (6, "unequal"), (6, "ratio"), (12, "unequal"), (20, "equal"), (20, "ratio")]
)
def test_intervals_of_few_groups_cover_as_often_as_they_say(n, sizes):
    """Percentiles of plain resamples cover 85 % at 6 groups, 91 % at 12."""
    generator = torch.Generator().manual_seed(n)
    size = torch.full((n,), 3) if sizes == "equal" else torch.arange(n) % 5 + 1
    group = torch.arange(n).repeat_interleave(size)
    values = torch.randn(n, 1000, generator=generator)[group] + 0.5 * torch.randn(len(group), 1000, generator=generator)
    if sizes == "ratio":
        below = torch.rand(len(group), generator=generator) + 0.5
        low, high = ratio_interval(values + 2 * below[:, None], below, group=group)
        low, high = low - 2, high - 2
    else:
        low, high = mean_interval(values, group=group)
    covered = float(((low <= 0) & (high >= 0)).float().mean())
    assert (0.91 if n == 6 else 0.93) < covered < 0.97


@pytest.mark.parametrize("n", [2, 3, 4])
def test_an_interval_of_very_few_groups_is_their_range(n):
    values = torch.arange(float(n))
    low, high = mean_interval(values)
    assert (float(low), float(high)) == (0.0, n - 1.0)


@pytest.mark.parametrize("level", [95, 0, 1.0, -0.5, "0.95"])
@pytest.mark.parametrize("interval", [mean_interval, studentised_interval])
def test_a_level_in_percent_ended_in_an_error_of_the_standard_library(interval, level):
    with refused(InputError, r"level is the share of cases .* between 0 and 1"):
        interval(torch.arange(5.0), level=level)


def test_one_group_has_no_interval():
    """It used to be [x, x], which looks like certainty."""
    for values, group in ((torch.ones(1, 3), None), (torch.ones(4, 3), torch.zeros(4, dtype=torch.long))):
        for ends in (mean_interval(values, group=group), ratio_interval(values, torch.ones(len(values)), group=group)):
            assert all(end.shape == (3,) and bool(end.isnan().all()) for end in ends)


def test_percentiles_lie_out_as_far_as_students_t_asks():
    from scipy.stats import norm, t

    from hooklens.results.statistics import _tail

    for n in (5, 6, 8, 16, 64):
        for level in (0.8, 0.9, 0.95, 0.99):
            exact = norm.cdf(-t.ppf((1 + level) / 2, n - 1) * (n / (n - 1)) ** 0.5)
            assert _tail(torch.arange(n).repeat_interleave(3), level) == pytest.approx(exact, rel=0.1, abs=2e-5)
    few = _tail(torch.tensor([0] * 20 + list(range(1, 8))), 0.95)  # one of 8 groups holds most pairs
    assert few < _tail(torch.arange(8), 0.95) < _tail(torch.arange(500), 0.95) < 0.025


def test_groups_widen_an_interval_of_pairs_that_are_copies():
    few = torch.randn(10, generator=torch.Generator().manual_seed(0))
    copies = few.repeat_interleave(8)
    narrow, wide = mean_interval(copies), mean_interval(copies, group=torch.arange(10).repeat_interleave(8))
    alone = mean_interval(few)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert close(torch.stack(wide), torch.stack(alone), ulps=20)


def test_a_ratio_recomputes_both_means():
    bottom = torch.rand(30, generator=torch.Generator().manual_seed(1)) + 0.5
    low, high = ratio_interval(3 * bottom[:, None], bottom)
    assert torch.allclose(low, torch.tensor(3.0)) and torch.allclose(high, torch.tensor(3.0))


def test_grids_of_any_shape_go_through():
    values = torch.randn(6, 2, 3, 5000 // 6, generator=torch.Generator().manual_seed(2))
    low, high = mean_interval(values, draws=50)
    one = mean_interval(values[:, 1, 2, 7], draws=50)
    assert (
        low.shape == values.shape[1:] and torch.allclose(low[1, 2, 7], one[0]) and torch.allclose(high[1, 2, 7], one[1])
    )


def test_p_values_are_uniform_where_nothing_is_there():
    values = torch.randn(20, 1000, generator=torch.Generator().manual_seed(3))
    p = sign_flip_p(values, draws=999)
    assert 0.03 < float((p <= 0.05).float().mean()) < 0.07
    assert sign_flip_p(values + 5, draws=999).max() <= 0.001 + 1e-9


def test_few_groups_are_counted_exactly():
    assert sign_flip_p(torch.tensor([1.0, 2.0, 4.0])).item() == pytest.approx(2 / 8)
    assert sign_flip_p(torch.tensor([1.0, -1.0])).item() == 1.0
    assert sign_flip_p(torch.ones(6), group=torch.tensor([0, 0, 1, 1, 2, 2])).item() == pytest.approx(2 / 8)


def test_a_null_p_is_never_zero():
    null = torch.arange(99.0)
    assert null_p(torch.tensor(1e9), null).item() == pytest.approx(0.01)
    assert null_p(torch.tensor(-1.0), null).item() == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_q_values_call_what_the_step_up_rule_calls(ps):
    p = torch.tensor(ps, dtype=torch.float64)
    q = q_values(p)
    for rate in (0.05, 0.1, 0.5):
        ordered, n = sorted(ps), len(ps)
        passed = [i + 1 for i in range(n) if ordered[i] <= rate * (i + 1) / n + 1e-12]
        cut = ordered[passed[-1] - 1] if passed else -1.0
        assert ((q <= rate + 1e-12) == (p <= cut)).all()


def test_q_values_leave_out_what_was_not_tested():
    q = q_values(torch.tensor([0.01, float("nan"), 0.04]))
    assert q[[0, 2]].tolist() == pytest.approx([0.02, 0.04]) and bool(q[1].isnan())
    assert bool(q_values(torch.tensor([float("nan")])).isnan().all())


def test_halves_share_no_group_and_repeat():
    group = torch.tensor([3, 3, 9, 9, 9, 1, 4, 4])
    choose, report = halves(8, group=group, seed=5)
    assert not set(group[choose].tolist()) & set(group[report].tolist())
    assert sorted([*choose.tolist(), *report.tolist()]) == list(range(8))
    assert torch.equal(choose, halves(8, group=group, seed=5)[0])
    with pytest.raises(InputError, match="at least two independent groups"):
        halves(2, group=torch.tensor([1, 1]))
    with pytest.raises(InputError, match="2 labels for 3 pairs"):
        group_numbers(3, torch.tensor([1, 1]))


def test_correlations_are_scipys_ties_and_all():
    from scipy.stats import pearsonr, spearmanr

    generator = torch.Generator().manual_seed(0)
    for size in (3, 10, 50):
        a, b = (torch.randint(5, (size,), generator=generator).double() for _ in range(2))
        assert correlation(a, b).item() == pytest.approx(pearsonr(a, b)[0])
        assert rank_correlation(a, b).item() == pytest.approx(spearmanr(a, b)[0])
    assert rank_correlation(a.exp(), b).item() == pytest.approx(rank_correlation(a, b).item())  # only order counts
    assert correlation(a, torch.ones_like(a)).isnan() and rank_correlation(a[:1], b[:1]).isnan()


def test_the_pattern_that_was_seen_counts_among_those_tried_also_in_float32():
    values = torch.rand(12, 200, generator=torch.Generator().manual_seed(0)) + 0.01  # sums in another order differ
    assert bool((sign_flip_p(values) == 2 / 2**12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_in_twenty_is_at_most_a_twentieth_whatever_the_dtype(dtype):
    """In float32, p of 1/20 is 0.05000000074 as a number, and above 0.05."""
    p = null_p(torch.tensor(5.0, dtype=dtype), torch.zeros(19, dtype=dtype))
    assert p.dtype == torch.float64 and float(p) == 1 / 20 and float(p) <= 0.05
    assert q_values(p[None]).dtype == torch.float64 and float(q_values(p[None])[0]) <= 0.05
    flips = sign_flip_p(torch.ones(6, dtype=dtype))
    assert flips.dtype == torch.float64 and float(flips) == 2 / 2**6
    assert q_values(torch.tensor([0.5], dtype=dtype)).dtype == torch.float64


def skewed(n: int, runs: int) -> torch.Tensor:
    """Lognormal values of mean 0, an experiment a column."""
    return torch.randn(n, runs, generator=torch.Generator().manual_seed(n), dtype=torch.float64).exp() - math.exp(0.5)


@pytest.mark.parametrize("n, least", [(6, 0.87), (40, 0.91)])
def test_a_studentised_interval_follows_skew(n, least):
    """Percentile intervals of lognormal values cover 0.84, 0.86 and 0.90; of normal ones both keep their level."""
    values = skewed(n, 1000)
    covered = [
        float(((low <= 0) & (high >= 0)).double().mean())
        for low, high in (mean_interval(values), studentised_interval(values))
    ]
    assert covered[1] > max(least, covered[0] + 0.015)
    low, high = studentised_interval(torch.randn(n, 1000, generator=torch.Generator().manual_seed(0)))
    assert 0.92 < float(((low <= 0) & (high >= 0)).double().mean()) < 0.975


def test_a_studentised_interval_counts_groups():
    values = torch.randn(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    copies, group = values.repeat_interleave(8, 0), torch.arange(10).repeat_interleave(8)
    for a, b in zip(studentised_interval(values), studentised_interval(copies, group=group), strict=True):
        torch.testing.assert_close(a, b)
    for few in (torch.zeros(10, dtype=torch.long), torch.arange(10) % 2):  # of two groups it would be [x, x]
        assert all(bool(end.isnan().all()) for end in studentised_interval(values, group=few))
    assert [float(end) for end in studentised_interval(torch.full((6,), 0.3))] == pytest.approx([0.3, 0.3])


def test_equal_values_leave_a_studentised_interval_finite():
    """A resample of the three equal ones alone has an error of rounding, whose t would be 1e5 or endless."""
    low, high = studentised_interval(torch.tensor([1.9, 1.5, 1.9, 2.1, 1.9, 2.0], dtype=torch.float64), level=0.98)
    assert 0.5 < float(low) < 1.88 < float(high) < 3.0


def test_what_is_said_of_few_groups_is_so():
    """The coverage that is told beside an interval of few groups is the one it has for normal values."""
    told = {n: float(few_groups(n).split("about ")[1].split()[0]) / 100 for n in (2, 3, 4, 5)}
    for n in (2, 3, 4):  # the range of n values, as another test shows: it misses 0 if all lie on one side
        assert told[n] == pytest.approx(1 - 2 / 2**n, abs=0.01)
    low, high = mean_interval(torch.randn(5, 4000, generator=torch.Generator().manual_seed(5)))
    assert float(((low <= 0) & (high >= 0)).double().mean()) == pytest.approx(told[5], abs=0.02)
    assert few_groups(6) == "" and few_groups(1) == "one group has no interval"
