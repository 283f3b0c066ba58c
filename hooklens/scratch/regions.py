"""Linear regions of a ReLU network on the plane, counted in exact arithmetic."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import real, whole
from hooklens.core.errors import InputError
from hooklens.results.result import Result
from hooklens.results.table import Table
from hooklens.scratch.layers import Linear, ReLU, Sequential

# A float is an integer over a power of 2, so that after scaling all weights are integers. A point is (X, Y, W) with
# W > 0, for (X/W, Y/W); a line is (a, b, c), for a x + b y + c = 0. Then the sign of a X + b Y + c W says on which side
# of the line the point is, and the line through two points, like the point on two lines, is a cross product: all of it
# without a division, and so without rounding.
Triple = tuple[int, int, int]
Affine = list[Triple]  # a x + b y + c for every neuron, times the scale of all of them
_SHOWN = 6  # decimals of an area


@dataclass(frozen=True)
class Region:
    """A convex polygon on which every neuron is either on or off."""

    corners: tuple[Triple, ...]
    on: tuple[bool, ...]
    output: tuple[tuple[Fraction, Fraction, Fraction], ...]

    @property
    def points(self) -> Float[Tensor, "corner 2"]:
        """The corners in their order around the region, rounded to float64."""
        return torch.tensor([[X / W, Y / W] for X, Y, W in self.corners], dtype=torch.float64)

    @property
    def area(self) -> Fraction:
        """The exact area (shoelace formula)."""
        places = [(Fraction(X, W), Fraction(Y, W)) for X, Y, W in self.corners]
        following = [*places[1:], places[0]]
        doubled = sum((x * v - u * y for (x, y), (u, v) in zip(places, following, strict=True)), Fraction(0))
        return abs(doubled) / 2


@dataclass(frozen=True, eq=False)
class LinearRegions(Result):
    """The regions of a square. `n_patterns` counts polygons by which neurons are on, `n_linear` by the function itself.

    In a polygon with one pattern the network is one affine function. Where a neuron that switches has no effect on the
    output, two neighbours have the same function and are one linear region.
    """

    n_patterns: int
    n_linear: int
    low: float
    high: float
    regions: list[Region]

    def table(self, n: int | None = None) -> Table:
        """The largest regions: area, share of the square, neurons that are on, corners."""
        whole_area = (self.high - self.low) ** 2
        rows = [
            (round(float(region.area), _SHOWN), float(region.area) / whole_area, sum(region.on), len(region.corners))
            for region in sorted(self.regions, key=lambda region: region.area, reverse=True)
        ]
        return Table(("area", "share", "neurons on", "corners"), rows).head(n)

    def figure(self) -> Any:
        """The square cut into its regions, coloured by the number of neurons that are on."""
        from hooklens.viz.plane_drawing import polygons

        counts = [sum(region.on) for region in self.regions]
        title = f"{self.n_patterns} regions of constant pattern, {self.n_linear} linear regions"
        return polygons([region.points for region in self.regions], counts, title, colourbar="neurons on")


def linear_regions(model: Sequential, *, low: float = -1.0, high: float = 1.0) -> LinearRegions:
    """Into how many linear pieces does a network of Linear and ReLU layers cut the square [low, high]^2?

    >>> layer = Linear(2, 2)
    >>> layer.parameters["W"] = torch.eye(2, dtype=torch.float64)
    >>> found = linear_regions(Sequential(layer, ReLU()))
    >>> found.n_patterns, found.n_linear, sum(region.area for region in found.regions)
    (4, 4, Fraction(4, 1))

    Inside a region of the layers so far, the next layer is affine in the input, so that each of its neurons switches
    along a line; the region is cut along these lines. The weights are taken as the exact numbers that their floats are,
    and nothing is rounded: parallel, coinciding and concurrent lines are counted as such.

    Reference: Montufar et al. (2014), "On the number of linear regions of deep neural networks", section 2; Hanin and
    Rolnick (2019), "Deep ReLU networks have surprisingly few activation patterns", section 2, for the two counts.
    """
    _check(model)
    if not real("low", low) < real("high", high):
        raise InputError(f"the square from low to high has low below high, got low={low}, high={high}")
    (a, b), scale = _integers(torch.tensor([low, high], dtype=torch.float64))
    square = ((a, a, scale), (b, a, scale), (b, b, scale), (a, b, scale))
    pieces: list[tuple[tuple[Triple, ...], tuple[bool, ...], Affine]] = [(square, (), [(1, 0, 0), (0, 1, 0)])]
    total = 1  # what the affine functions have been multiplied by
    for layer in model.parts():
        if isinstance(layer, Linear):
            n_in = layer.n_in
            numbers, scale = _integers(torch.cat([layer.parameters["W"].flatten(), layer.parameters["b"]]))
            columns = [numbers[j : n_in * layer.n_out : layer.n_out] for j in range(layer.n_out)]
            biases = [total * bias for bias in numbers[n_in * layer.n_out :]]
            pieces = [(corners, on, _through(columns, biases, affine)) for corners, on, affine in pieces]
            total *= scale
        else:
            pieces = [
                (polygon, (*on, *now), [f if active else (0, 0, 0) for f, active in zip(affine, now, strict=True)])
                for corners, on, affine in pieces
                for polygon, now in _cut(corners, affine)
            ]
    regions = []
    for corners, on, affine in pieces:
        output = tuple((Fraction(a, total), Fraction(b, total), Fraction(c, total)) for a, b, c in affine)
        regions.append(Region(corners, on, output))
    return LinearRegions(
        n_patterns=len(regions), n_linear=_count_linear(regions), low=float(low), high=float(high), regions=regions
    )


def arrangement_regions(n_lines: int, d: int = 2) -> int:
    """The regions of `n_lines` hyperplanes in general position in d dimensions: sum over k <= d of C(n, k).

    >>> arrangement_regions(3), arrangement_regions(10), arrangement_regions(2, d=1)
    (7, 56, 3)

    One layer of n ReLUs cuts the whole space into at most as many regions.

    Reference: Schlaefli (1901); Zaslavsky (1975), "Facing up to arrangements"; Pascanu et al. (2013), "On the number of
    response regions of deep feedforward networks with piecewise linear activations", proposition 2.
    """
    whole("n_lines", n_lines)
    whole("d", d, 1)
    return sum(math.comb(n_lines, k) for k in range(d + 1))


def _integers(values: Float[Tensor, "value"]) -> tuple[list[int], int]:
    """Integers and a scale (a power of 2) whose quotients are exactly these floats."""
    ratios = [value.as_integer_ratio() for value in values.tolist()]
    scale = max(bottom for _, bottom in ratios)
    return [top * (scale // bottom) for top, bottom in ratios], scale


def _through(columns: list[list[int]], biases: list[int], affine: Affine) -> Affine:
    """The functions of the next Linear layer, from those of its inputs."""
    outputs = []
    for weights, bias in zip(columns, biases, strict=True):
        a, b, c = (sum(w * f[i] for w, f in zip(weights, affine, strict=True)) for i in range(3))
        outputs.append((a, b, c + bias))
    return outputs


def _cut(corners: tuple[Triple, ...], affine: Affine) -> Iterator[tuple[tuple[Triple, ...], tuple[bool, ...]]]:
    """The parts of a polygon between the lines along which these functions are 0, and which are positive there."""
    polygons: list[tuple[tuple[Triple, ...], tuple[bool, ...]]] = [(corners, ())]
    for line in affine:
        parts = []
        for polygon, on in polygons:
            heights = [_dot(line, corner) for corner in polygon]
            if max(heights) > 0:
                parts.append((_above(polygon, heights), (*on, True)))
            if min(heights) < 0 or max(heights) <= 0:
                parts.append((_above(polygon, [-height for height in heights]), (*on, False)))
        polygons = parts
    yield from polygons


def _above(polygon: tuple[Triple, ...], heights: list[int]) -> tuple[Triple, ...]:
    """The part of a convex polygon where a function with these heights at the corners is at least 0.

    Reference: Sutherland and Hodgman (1974), "Reentrant polygon clipping".
    """
    kept: list[Triple] = []
    for i, (corner, height) in enumerate(zip(polygon, heights, strict=True)):
        before, height_before = polygon[i - 1], heights[i - 1]
        if height * height_before < 0:  # the side from the corner before crosses 0
            low, high = sorted([(height_before, before), (height, corner)])
            kept.append(_lowest_terms([high[0] * p - low[0] * q for p, q in zip(low[1], high[1], strict=True)]))
        if height >= 0:
            kept.append(corner)
    return tuple(kept)


def _dot(line: Triple, point: Triple) -> int:
    return line[0] * point[0] + line[1] * point[1] + line[2] * point[2]


def _lowest_terms(point: Sequence[int]) -> Triple:
    X, Y, W = point
    common = math.gcd(X, Y, W)
    return X // common, Y // common, W // common


def _count_linear(regions: Sequence[Region]) -> int:
    """How many regions are left when neighbours with the same function are joined."""
    same = defaultdict(list)
    for region in regions:
        same[region.output].append(region)
    return sum(_count_connected(group) for group in same.values())


def _count_connected(regions: list[Region]) -> int:
    waiting, count = list(regions), 0
    while waiting:
        count += 1
        reached = [waiting.pop()]
        while reached:
            here = reached.pop()
            beside = [region for region in waiting if _touch(here, region)]
            waiting = [region for region in waiting if region not in beside]
            reached += beside
    return count


def _touch(first: Region, second: Region) -> bool:
    """Whether two regions have a piece of a side in common; a corner is not enough."""
    return any(_overlap(side, other) for side in _sides(first) for other in _sides(second))


def _sides(region: Region) -> Iterator[tuple[Triple, Triple]]:
    return zip(region.corners, (*region.corners[1:], region.corners[0]), strict=True)


def _overlap(side: tuple[Triple, Triple], other: tuple[Triple, Triple]) -> bool:
    """Whether two segments lie on one line and share more than a point."""
    (x, y, w), (u, v, t) = side
    line = (y * t - w * v, w * u - x * t, x * v - y * u)
    if any(_dot(line, corner) for corner in other):
        return False
    places = [[(Fraction(X, W), Fraction(Y, W)) for X, Y, W in segment] for segment in (side, other)]
    starts, ends = zip(*(sorted(segment) for segment in places), strict=True)
    return max(starts) < min(ends)  # along a line, the order of (x, y) is the order on the line


def _check(model: Sequential) -> None:
    layers = model.parts()
    if not all(isinstance(layer, Linear | ReLU) for layer in layers):
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise InputError(
            f"regions are counted for Linear and ReLU layers, got {kinds}; use ReLU, as a GELU bends smoothly"
        )
    if not layers or not isinstance(layers[0], Linear) or layers[0].n_in != 2:
        raise InputError("regions are counted on the plane: the first layer is a Linear layer of 2 inputs")
    for layer in layers:
        if not all(bool(parameter.isfinite().all()) for parameter in layer.parameters.values()):
            raise InputError("regions are counted for finite weights, got NaN or infinity; did the training diverge?")
