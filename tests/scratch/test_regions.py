"""Regions of networks whose number is known: arrangements of lines, folded planes, and what random points see."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from refused import refused

from hooklens.core.errors import InputError
from hooklens.scratch import GELU, Linear, ReLU, Sequential, arrangement_regions, linear_regions, view_neurons

DOUBLE = {"dtype": torch.float64}


def linear(W, b):
    """A Linear layer with these weights, [in out]."""
    W = torch.tensor(W, **DOUBLE)
    layer = Linear(*W.shape)
    layer.parameters = {"W": W, "b": torch.tensor(b, **DOUBLE)}
    return layer


def random_network(*sizes, seed=0):
    layers = []
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        layer = Linear(n_in, n_out, seed=100 * seed + i)
        layer.parameters["b"] += 0.3 * torch.randn(
            n_out, generator=torch.Generator().manual_seed(1000 + seed + i), **DOUBLE
        )
        layers += [layer, ReLU()]
    return Sequential(*layers[:-1])


def test_the_formula_of_arrangements():
    assert [arrangement_regions(n) for n in range(6)] == [1, 2, 4, 7, 11, 16]
    assert [arrangement_regions(n, 1) for n in range(4)] == [1, 2, 3, 4]
    assert all(arrangement_regions(n, d) == 2**n for n in range(6) for d in range(n, 7) if d)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_lines_in_general_position_give_as_many_regions_as_the_formula_says(n):
    layer = Linear(2, n, seed=n)
    layer.parameters["b"] = torch.randn(n, generator=torch.Generator().manual_seed(1000 + n), **DOUBLE)
    regions = linear_regions(Sequential(layer, ReLU()), low=-1e9, high=1e9)  # holds every crossing of the lines
    assert regions.n_patterns == arrangement_regions(n)
    assert len({region.on for region in regions.regions}) == arrangement_regions(n)


@pytest.mark.parametrize("seed", range(3))
def test_in_a_square_each_line_and_each_crossing_adds_one_region(seed):
    """Of lines in general position, a convex set has 1 + (lines that meet it) + (crossings in it) regions."""
    layer = Linear(2, 9, seed=seed)
    layer.parameters["b"] = torch.randn(9, generator=torch.Generator().manual_seed(1000 + seed), **DOUBLE)
    W, b = layer.parameters["W"].T.tolist(), layer.parameters["b"].tolist()
    lines = [tuple(map(Fraction, (*w, c))) for w, c in zip(W, b, strict=True)]
    meeting = sum(abs(c) < abs(u) + abs(v) for u, v, c in lines)
    crossings = 0
    for i, (a, c, e) in enumerate(lines):
        for u, v, w in lines[:i]:
            bottom = a * v - c * u
            crossings += abs((c * w - v * e) / bottom) < 1 and abs((e * u - w * a) / bottom) < 1
    assert linear_regions(Sequential(layer, ReLU())).n_patterns == 1 + meeting + crossings


@pytest.mark.parametrize("n, W, b, patterns", [
    ("parallel", [[1, 1, 1], [0, 0, 0]], [0.5, 0, -0.5], 4),
    ("the same line, three times", [[1, 2, -1], [1, 2, -1]], [0, 0, 0], 2),
    ("through one point", [[1, 0, 1, 1], [0, 1, 1, -1]], [0, 0, 0, 0], 8),
    ("through one point that no float is", [[3, 0, 3], [0, 3, 3]], [-1, -1, -2], 6),
    ("outside the square", [[1, 0], [0, 1]], [2, -2], 1),
    ("along a side of the square", [[1, 0], [0, 1]], [1, -1], 1),
    ("through a corner of the square", [[1], [1]], [-2], 1),
    ("neurons that see nothing", [[0, 0, 0], [0, 0, 0]], [0, 1, -1], 1),
])  # fmt: skip
def test_lines_in_special_position_are_counted_as_such(n, W, b, patterns):
    regions = linear_regions(Sequential(linear(W, b), ReLU()))
    assert regions.n_patterns == patterns
    assert sum(region.area for region in regions.regions) == 4


def folds(times):
    """x -> |x| - 1/2 for both coordinates, then twice as large: every layer folds the square onto itself."""
    parts = []
    for _ in range(times):
        parts += [linear([[1, -1, 0, 0], [0, 0, 1, -1]], [0] * 4), ReLU()]
        parts.append(linear([[2, 0], [2, 0], [0, 2], [0, 2]], [-1, -1]))
    return Sequential(*parts)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_every_fold_of_the_square_multiplies_its_regions_by_four(times):
    """Montufar et al. (2014), section 3: depth multiplies regions, where width adds them."""
    regions = linear_regions(folds(times))
    assert regions.n_patterns == regions.n_linear == 4**times
    assert {region.area for region in regions.regions} == {Fraction(4, 4**times)}


@pytest.mark.parametrize("seed", range(3))
def test_random_points_see_no_region_that_was_not_counted(seed):
    model = random_network(2, 6, 5, 1, seed=seed)
    regions = linear_regions(model)
    x = 2 * torch.rand(20_000, 2, generator=torch.Generator().manual_seed(seed), **DOUBLE) - 1
    patterns, value = [], x
    for part in model.parts():
        value = part.compute(value)
        if isinstance(part, ReLU):
            patterns.append(value > 0)
    seen = {tuple(row) for row in torch.cat(patterns, 1).tolist()}
    counted = [region.on for region in regions.regions]
    assert seen <= set(counted) and len(seen) <= regions.n_patterns == len(counted)
    large = {region.on for region in regions.regions if region.area > 0.01}  # 20,000 points miss it once in 10^21
    assert large <= seen
    assert sum(region.area for region in regions.regions) == 4


def test_in_each_region_the_network_is_the_affine_function_that_the_region_says():
    model = random_network(2, 6, 5, 2, seed=7)
    for region in linear_regions(model).regions:
        x = torch.cat([region.points, region.points.mean(0, keepdim=True)])
        a, b, c = torch.tensor([[float(number) for number in output] for output in region.output], **DOUBLE).T
        expected = x[:, :1] * a + x[:, 1:] * b + c
        assert torch.allclose(model.forward(x), expected, rtol=1e-12, atol=1e-12)


def test_a_neuron_without_effect_cuts_no_linear_region():
    hidden = linear([[1, 0], [0, 1]], [0, 0])
    regions = linear_regions(Sequential(hidden, ReLU(), linear([[1], [0]], [0])))
    assert (regions.n_patterns, regions.n_linear) == (4, 2)
    hat = linear_regions(
        Sequential(linear([[1, 1, 1], [0, 0, 0]], [0.5, 0, -0.5]), ReLU(), linear([[1], [-2], [1]], [0]))
    )
    assert (hat.n_patterns, hat.n_linear) == (4, 4)  # 0 on both sides of the hat: equal functions that do not touch
    step = Sequential(linear([[1, 1], [0, 0]], [0.5, -0.5]), ReLU(), linear([[1], [-1]], [0]))
    assert linear_regions(step).n_linear == 3
    diagonal = linear_regions(
        Sequential(
            hidden,
            ReLU(),
            linear([[1], [1]], [0]),
            linear(
                [
                    [0],
                ],
                [3],
            ),
        )
    )
    assert (diagonal.n_patterns, diagonal.n_linear) == (4, 1)


def test_regions_that_meet_only_in_a_corner_are_two():
    """relu(x) + relu(-x) + relu(y) + relu(-y) - relu(x+y) - relu(-x-y): 0 where x and y have the same sign."""
    W = [[1, -1, 0, 0, 1, -1], [0, 0, 1, -1, 1, -1]]
    out = linear([[1], [1], [1], [1], [-1], [-1]], [0])
    regions = linear_regions(Sequential(linear(W, [0] * 6), ReLU(), out))
    assert (regions.n_patterns, regions.n_linear) == (6, 6)
    assert sum(region.output == ((0, 0, 0),) for region in regions.regions) == 2


def test_the_table_and_the_picture_show_every_region():
    regions = linear_regions(folds(1))
    assert regions.table().rows == ((1.0, 0.25, 2, 4),) * 4
    figure = regions.figure()
    drawn = [x for trace in figure.data for x in trace.x if x is not None]
    assert len(drawn) == 4 * (4 + 2) and "4 linear regions" in figure.layout.title.text
    views = view_neurons(folds(1), torch.tensor([[0.5, 0.5], [-0.5, 0.5]], **DOUBLE), size=5)
    assert views.names == ["L0N0", "L0N1", "L0N2", "L0N3", "out0", "out1"]
    assert views.points_on.tolist() == [0.5, 0.5, 1.0, 0.0, 0.0, 0.0]
    assert torch.equal(views.post[0], views.ticks.clamp_min(0).expand(5, 5))
    assert torch.equal(views.post[2], views.ticks.clamp_min(0)[:, None].expand(5, 5))
    assert [trace.type for trace in views.figure().data].count("contour") == 6
    assert views.table().rows[0][:2] == ("L0N0", 0.4)


def test_what_has_no_regions_on_the_plane_is_refused():
    with refused(InputError, "got Linear, GELU, Linear; use ReLU"):
        linear_regions(Sequential(Linear(2, 2), GELU(), Linear(2, 1)))
    for model in (Sequential(), Sequential(ReLU()), Sequential(Linear(3, 2))):
        for function in (linear_regions, view_neurons):
            with refused(InputError, "the first layer is a Linear layer of 2 inputs"):
                function(model)
    for function in (linear_regions, view_neurons):
        with refused(InputError, "has low below high, got low=1.0, high=1.0"):
            function(Sequential(Linear(2, 2)), low=1.0, high=1.0)
    with refused(InputError, "finite weights"):
        linear_regions(Sequential(linear([[float("nan")], [1.0]], [0.0])))
    with refused(InputError, r"rows of 2 numbers \[row 2\], got shape \[4, 3\]"):
        view_neurons(Sequential(Linear(2, 2)), torch.zeros(4, 3, **DOUBLE))
    with refused(InputError, "n_lines is a whole number"):
        arrangement_regions(-1)
