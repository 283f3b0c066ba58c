"""What each neuron of a network on the plane sees: where it is on, and along which line it switches."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import real, whole
from hooklens.core.errors import InputError
from hooklens.results.result import Result
from hooklens.results.table import Table
from hooklens.scratch.layers import Linear, Sequential, check_rows


@dataclass(frozen=True, eq=False)
class NeuronViews(Result):
    """The neurons over a square. L0N3 is neuron 3 behind the first Linear layer; `out0` is an output of the network.

    `pre` is the value before the nonlinearity and `post` the value after it. A neuron switches where `pre` is 0: along
    a straight line in the first layer, along one that bends at the lines of the layers before in the others.
    """

    names: list[str]
    pre: Float[Tensor, "neuron y x"]
    post: Float[Tensor, "neuron y x"]
    ticks: Float[Tensor, "x"]
    points: Float[Tensor, "row 2"]
    points_on: Float[Tensor, "neuron"]

    terms = {
        "on in the square": "share of the square where the value before the nonlinearity is above 0",
        "on at the points": "the same share of the given points; NaN if there are none",
    }

    def table(self, n: int | None = None) -> Table:
        """One row per neuron: where it is on, and its largest value."""
        share = (self.pre > 0).double().mean((1, 2)).tolist()
        largest = self.post.amax((1, 2)).tolist()
        rows = list(zip(self.names, share, self.points_on.tolist(), largest, strict=True))
        return Table(("neuron", "on in the square", "on at the points", "largest value"), rows).head(n)

    def figure(self) -> Any:
        """A map of every neuron over the plane; a line where it switches, and the given points."""
        from hooklens.viz.plane_drawing import plane_maps

        title = "What each neuron sees: its value (0 is white) and the line along which it switches"
        return plane_maps(self.post, self.ticks, self.names, title, boundaries=self.pre, points=self.points)


def view_neurons(
    model: Sequential,
    points: Float[Tensor, "row 2"] | None = None,
    *,
    low: float = -1.0,
    high: float = 1.0,
    size: int = 61,
) -> NeuronViews:
    """Where on the square [low, high]^2 is each neuron on, and how strongly?

    >>> from hooklens.scratch.layers import ReLU
    >>> layer = Linear(2, 1)
    >>> layer.parameters["W"] = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    >>> view_neurons(Sequential(layer, ReLU()), size=3).post[0]   # y x: max(x, 0) for x = -1, 0, 1
    tensor([[0., 0., 1.],
            [0., 0., 1.],
            [0., 0., 1.]], dtype=torch.float64)

    The values are computed at `size` x `size` places. The model may have any layers, the first of them Linear(2, n).
    """
    parts = model.parts()
    if not parts or not isinstance(parts[0], Linear) or parts[0].n_in != 2:
        raise InputError("neurons are drawn over the plane: the first layer is a Linear layer of 2 inputs")
    if not real("low", low) < real("high", high):
        raise InputError(f"the square from low to high has low below high, got low={low}, high={high}")
    whole("size", size, 2)
    dtype = parts[0].parameters["W"].dtype
    ticks = torch.linspace(low, high, size, dtype=dtype)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    if points is None:
        points = ticks.new_empty(0, 2)
    check_rows("view_neurons", points, 2, dtype)
    names, pre, post = _neurons(model, torch.cat([torch.stack([x.flatten(), y.flatten()], 1), points]))
    n = size * size
    return NeuronViews(
        names=names,
        pre=pre[:n].T.reshape(-1, size, size),
        post=post[:n].T.reshape(-1, size, size),
        ticks=ticks,
        points=points,
        points_on=(pre[n:] > 0).to(dtype).mean(0),
    )


def _neurons(
    model: Sequential, x: Tensor
) -> tuple[list[str], Float[Tensor, "row neuron"], Float[Tensor, "row neuron"]]:
    """The values of all neurons before and after their nonlinearity; the outputs of the network last."""
    names, pre, post, layer = [], [], [], 0
    parts = model.parts()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        x = part.compute(x)
        if not isinstance(part, Linear):
            continue
        hidden = following is not None and not isinstance(following, Linear)
        names += [f"L{layer}N{i}" if following is not None else f"out{i}" for i in range(part.n_out)]
        pre.append(x)
        post.append(following.compute(x) if hidden and following is not None else x)
        layer += 1
    return names, torch.cat(pre, 1), torch.cat(post, 1)
