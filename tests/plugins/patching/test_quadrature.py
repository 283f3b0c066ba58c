"""Integrals along a path: exact where the rule is, and its points where the path is rough."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.core.errors import InputError
from hooklens.plugins.patching.quadrature import integrate


def of(function, slope):
    """An `evaluate` for one token, the same function for every prompt."""
    return lambda at: (function(at), slope(at)[..., None])


@given(a=st.floats(-3, 3), b=st.floats(-3, 3), c=st.floats(-3, 3), most=st.integers(3, 40))
@settings(max_examples=30, deadline=None)
def test_cubic_slopes_are_integrated_exactly(a, b, c, most):
    """Simpson's rule has no error up to the third degree, however few the points."""
    found = integrate(of(lambda t: a * t**4 + b * t**2 + c * t, lambda t: 4 * a * t**3 + 2 * b * t + c), 2, most)
    torch.testing.assert_close(
        found.per_token[:, 0], torch.full((2,), a + b + c, dtype=torch.float64), atol=1e-9, rtol=1e-9
    )
    assert found.n_nodes <= most


def test_more_points_find_more():
    evaluate = of(lambda t: (9 * t).sin(), lambda t: 9 * (9 * t).cos())
    errors = [abs(float(integrate(evaluate, 1, most).per_token) - math.sin(9)) for most in (5, 17, 65)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_points_go_where_the_path_is_rough():
    """A step of width 1/1000: 60 even points would miss it, 60 chosen ones find its height."""
    seen = []

    def evaluate(at):
        seen.append(at)
        x = 1000 * (at - 0.3712)
        return x.sigmoid(), (1000 * x.sigmoid() * (1 - x.sigmoid()))[..., None]

    found = integrate(evaluate, 1, 61)
    assert float(found.per_token) == pytest.approx(1, abs=0.02) and found.n_nodes == 61
    assert float(((torch.cat(seen) - 0.3712).abs() < 0.02).float().mean()) > 0.3


def test_each_prompt_has_its_own_points():
    centres = torch.tensor([0.2, 0.8], dtype=torch.float64)

    def evaluate(at):
        x = 200 * (at - centres)
        return x.sigmoid(), torch.stack([200 * x.sigmoid() * (1 - x.sigmoid()), torch.zeros_like(x)], -1)

    found = integrate(evaluate, 2, 41)
    torch.testing.assert_close(found.per_token[:, 0], found.end - found.start, atol=0.02, rtol=0)
    assert found.per_token[:, 1].tolist() == [0, 0]
    for i in range(2):
        alone = integrate(lambda at, i=i: tuple(x[:, i : i + 1] for x in evaluate(at.expand(-1, 2))), 1, 41)
        torch.testing.assert_close(alone.per_token[0], found.per_token[i])


def test_too_few_points_are_refused():
    with pytest.raises(InputError, match="at least 3"):
        integrate(of(lambda t: t, torch.ones_like), 1, 2)
