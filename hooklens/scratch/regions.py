"""Linear regions of a ReLU network on the plane, counted exactly by cutting polygons."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.scratch.layers import Linear, ReLU, Sequential

Polygon = Float[Tensor, "corner 2"]
Affine = tuple[Float[Tensor, "2 out"], Float[Tensor, "out"]]
_THIN = 1e-12  # of the box's area: pieces below it come from rounding


@dataclass(frozen=True)
class Region:
    """A convex polygon on which the network is linear, and which neurons are on there."""

    polygon: Polygon
    on: tuple[Bool[Tensor, "neuron"], ...]

    @property
    def area(self) -> float:
        """The area, by the shoelace formula."""
        x, y = self.polygon.unbind(1)
        return abs(float((x * y.roll(-1) - y * x.roll(-1)).sum())) / 2


def linear_regions(model: Sequential, *, low: float = -1.0, high: float = 1.0) -> list[Region]:
    """The regions of the square [low, high]^2 on which a network of Linear and ReLU layers is linear.

    >>> layer = Linear(2, 2, seed=0)
    >>> layer.parameters = {"W": torch.eye(2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    >>> regions = linear_regions(Sequential(layer, ReLU()))
    >>> len(regions), sum(region.area for region in regions)
    (4, 4.0)

    Inside a region of one layer, the next layer is affine in the input, so that each of its neurons switches on along
    a line: the region is cut along these lines.

    Reference: Montufar et al. (2014), "On the number of linear regions of deep neural networks", section 2.
    """
    _check(model)
    corners = torch.tensor([[low, low], [high, low], [high, high], [low, high]], dtype=torch.float64)
    identity: Affine = (torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    pieces: list[tuple[Region, Affine]] = [(Region(corners, ()), identity)]
    thinnest = _THIN * (high - low) ** 2
    for layer in model.layers:
        if isinstance(layer, Linear):
            weight, bias = layer.parameters["W"].double(), layer.parameters["b"].double()
            pieces = [(region, (a @ weight, b @ weight + bias)) for region, (a, b) in pieces]
        else:
            pieces = [piece for region, affine in pieces for piece in _cut(region, affine, thinnest)]
    return [region for region, _ in pieces]


def _cut(region: Region, affine: Affine, thinnest: float) -> list[tuple[Region, Affine]]:
    """The pieces of a region between the lines along which the neurons of a layer switch, and the layer's output."""
    a, b = affine
    polygons = [region.polygon]
    for neuron in range(len(b)):
        halves = [half for polygon in polygons for half in halves_of(polygon, a[:, neuron], b[neuron])]
        polygons = [half for half in halves if len(half) > 2 and Region(half, ()).area > thinnest]
    pieces = []
    for polygon in polygons:
        on = polygon.mean(0) @ a + b > 0
        pieces.append((Region(polygon, (*region.on, on)), (a * on, b * on)))
    return pieces


def halves_of(polygon: Polygon, normal: Float[Tensor, "2"], offset: Float[Tensor, ""]) -> tuple[Polygon, Polygon]:
    """The parts of a convex polygon where normal x + offset is at least 0, and at most 0.

    Reference: Sutherland and Hodgman (1974), "Reentrant polygon clipping".
    """
    heights = polygon @ normal + offset
    above, below = [], []
    for i in range(len(polygon)):
        here, there = heights[i], heights[(i + 1) % len(polygon)]
        if here >= 0:
            above.append(polygon[i])
        if here <= 0:
            below.append(polygon[i])
        if here * there < 0:
            crossing = polygon[i] + (polygon[(i + 1) % len(polygon)] - polygon[i]) * (here / (here - there))
            above.append(crossing)
            below.append(crossing)
    empty = polygon.new_empty(0, 2)
    return (torch.stack(above) if above else empty), (torch.stack(below) if below else empty)


def _check(model: Sequential) -> None:
    layers: Sequence = model.layers
    if not all(isinstance(layer, Linear | ReLU) for layer in layers):
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise InputError(f"regions are counted for Linear and ReLU layers, got {kinds}; a GELU is linear nowhere")
    first = next((layer for layer in layers if isinstance(layer, Linear)), None)
    if first is None or len(first.parameters["W"]) != 2:
        raise InputError("regions are counted on the plane: the first Linear layer takes 2 numbers")
