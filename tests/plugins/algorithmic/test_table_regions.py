"""Accuracy by region of the table, against counting by hand, and the interval's coverage, computed exactly."""

import math

import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError
from hooklens.model.config import Biases
from hooklens.plugins.algorithmic.grokking import binomial_interval, measure_regions
from hooklens.plugins.algorithmic.grokking.table_regions import correct_pairs
from hooklens.testing import tiny_model


def always(answer, p):
    """A model that gives every pair the same answer."""
    model = tiny_model(d_vocab=p + 1, n_layers=1, biases=Biases(unembed=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.b_U[answer] = 1.0
    return model


def test_regions_are_counted_as_by_hand():
    data = hl.data.modular_arithmetic(p=7, fraction=0.4, seed=2)
    model = always(3, 7)
    regions = measure_regions(model, data)
    trained = {tuple(pair) for pair in data.pairs[0].tolist()}
    unseen = [(a, b) for a in range(7) for b in range(7) if (a, b) not in trained]
    members = {
        "all unseen pairs": unseen,
        "partner (b, a) trained": [(a, b) for a, b in unseen if (b, a) in trained],
        "partner (b, a) not trained": [(a, b) for a, b in unseen if (b, a) not in trained and a != b],
        "diagonal a = b": [(a, b) for a, b in unseen if a == b],
        "a + b below p": [(a, b) for a, b in unseen if a + b < 7],
        "a + b at least p": [(a, b) for a, b in unseen if a + b >= 7],
        "a or b is 0": [(a, b) for a, b in unseen if 0 in (a, b)],
    }
    for name, pairs in members.items():
        at = regions.regions.index(name)
        assert int(regions.n[at]) == len(pairs)
        assert int(regions.n_correct[at]) == sum((a + b) % 7 == 3 for a, b in pairs)
    support = {(a, b): sum(pair[0] == a for pair in trained) + sum(pair[1] == b for pair in trained) for a, b in unseen}
    for name in regions.regions:
        if name.startswith("row and column with at most"):
            bound = int(name.split()[-3])
            assert int(regions.n[regions.regions.index(name)]) == sum(n <= bound for n in support.values())
    assert int(regions.trained.sum()) == len(trained) and int(regions.correct.sum()) == 7


def test_regions_follow_the_operation():
    data = hl.data.modular_arithmetic(p=5, operation="x", fraction=0.5)
    regions = measure_regions(always(0, 5), data)  # right where a factor is 0
    assert float(regions.accuracy[regions.regions.index("a or b is 0")]) == 1.0
    assert "a + b below p" not in regions.regions and "weakest region" in regions.statement
    assert not any("partner" in name for name in measure_regions(always(0, 5), _minus()).regions)


def test_a_perfect_model_has_no_weakest_region():
    data = hl.data.modular_arithmetic(p=5, fraction=0.5)
    object.__setattr__(data, "table", torch.full((5, 5), 3))  # a table that this model knows
    regions = measure_regions(always(3, 5), data)
    assert regions.weakest is None and "in every region of the table" in regions.statement
    assert bool((regions.accuracy.nan_to_num(1.0) == 1).all())
    none_right = measure_regions(always(2, 5), data)
    assert none_right.weakest is None and none_right.statement.startswith("0 of ")


def test_a_model_without_equals_was_said_to_be_of_another_p():
    with refused(HooklensError, "this model has d_vocab 7: no token '='"):
        measure_regions(tiny_model(d_vocab=7), hl.data.modular_arithmetic(7, fraction=0.5))


def _minus():
    return hl.data.modular_arithmetic(p=5, operation="-", fraction=0.5)


def test_shuffled_answers_are_those_that_count():
    data = hl.data.modular_arithmetic(p=5, fraction=0.5, shuffled=True)
    assert torch.equal(correct_pairs(always(2, 5), data), data.table == 2)


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        (lambda: tiny_model(d_vocab=8), hl.data.modular_arithmetic(p=5), "it was trained on p = 7"),
        (lambda: tiny_model(d_vocab=6, n_ctx=2), hl.data.modular_arithmetic(p=5), "has n_ctx 2"),
        (lambda: tiny_model(d_vocab=6), hl.data.modular_arithmetic(p=5, fraction=1.0), "none is unseen"),
    ],
)
def test_models_and_tables_that_do_not_fit_are_refused(model, data, says):
    with refused(HooklensError, says):
        measure_regions(model(), data)


@pytest.mark.parametrize("n", [1, 5, 20])
def test_the_interval_covers_at_least_95_percent_of_draws_at_every_share(n):
    ends = [binomial_interval(k, n) for k in range(n + 1)]
    for share in torch.linspace(0, 1, 41, dtype=torch.float64).tolist():
        chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
        covered = sum(chance for chance, (low, high) in zip(chances, ends, strict=True) if low <= share <= high)
        assert covered >= 0.95 - 1e-12


def test_the_interval_is_the_published_one():
    # no failure in n: the upper end of the failure rate is 1 - (alpha / 2)^(1 / n)
    low, high = binomial_interval(30, 30)
    assert high == 1.0 and math.isclose(low, 0.025 ** (1 / 30), rel_tol=1e-9)
    low, high = binomial_interval(1, 2)  # P(at least 1 of 2) = 1 - (1 - x)^2
    assert math.isclose(low, 1 - math.sqrt(0.975), rel_tol=1e-9) and math.isclose(high, math.sqrt(0.975), rel_tol=1e-9)
    for call in (lambda: binomial_interval(3, 2), lambda: binomial_interval(1, 2, level=1.0)):
        with refused(HooklensError, "got"):
            call()


def test_a_model_or_a_table_that_is_none_failed_at_a_missing_attribute():
    with refused(HooklensError, "needs a HookedTransformer, got str"):
        measure_regions("m", hl.data.modular_arithmetic(p=5))
    with refused(HooklensError, "modular_arithmetic"):
        measure_regions(tiny_model(d_vocab=6), 5)


def test_the_colours_of_the_table_are_three_with_their_meaning_beside_them():
    data = hl.data.modular_arithmetic(p=5, fraction=0.4)
    drawn = measure_regions(always(2, 5), data).figure().data[0]
    assert list(drawn.colorbar.ticktext) == ["unseen, wrong", "unseen, correct", "trained"]
    colours = dict(drawn.colorscale)
    assert len(set(colours.values())) == 3
    for value, colour in enumerate(dict.fromkeys(colour for _, colour in drawn.colorscale)):
        at = (value - drawn.zmin) / (drawn.zmax - drawn.zmin)  # where the value lies on the scale
        below = [c for place, c in drawn.colorscale if place <= at]
        assert below[-1] == colour
