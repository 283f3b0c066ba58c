"""Embedding circles: the numbers in the plane of one frequency, and in planes of principal components."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import ArgumentError, InputError
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import checked_frequencies, distinguished, frequency_power, transform
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.pair_table import Task, modulus_of
from hooklens.plugins.algorithmic.fourier.weight_spectra import embedding_rows_of
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table


@dataclass(frozen=True, eq=False)
class Circles(Result):
    """The rows of W_E projected onto planes.

    `planes[i]` is the frequency's plane: the span of its cosine and sine coefficients, vectors of d_model. The raw
    rows, not filtered ones, are projected onto it, so that their other frequencies blur the circle. `variance` is the
    share of the rows' variance over the numbers that the plane holds, `pure` the share of the points' own variance in
    the plane that has this frequency, and `roundness` the ratio of the two radii of that part, 1 for a circle.

    `components` are the rows on pairs of principal components, `component_frequency` the frequency that most of each
    pair's variance has, and `component_pure` that share.
    """

    ranked_by = "share of the variance of the embedding"
    baselines = ("chance",)
    terms = {
        "variance": "share of the variance of the rows over the numbers that lies in the plane",
        "of this frequency": "share of the variance in the plane that has this frequency",
        "roundness": "ratio of the smaller to the larger radius of the part with this frequency; 1 for a circle",
        "points": "distinct places on the circle: p divided by the common divisor of frequency and p",
    }

    modulus: int
    frequencies: Int[Tensor, "plane"]
    planes: Float[Tensor, "plane p 2"]
    variance: Float[Tensor, "plane"]
    pure: Float[Tensor, "plane"]
    roundness: Float[Tensor, "plane"]
    components: Float[Tensor, "pair p 2"]
    component_variance: Float[Tensor, "pair"]
    component_frequency: Int[Tensor, "pair"]
    component_pure: Float[Tensor, "pair"]
    d_model: int

    @property
    def chance(self) -> float:
        """The `variance` of a random embedding, on average: its own frequency, and other ones in any two directions."""
        own = 2 / (self.modulus - 1)
        return own + (1 - own) * min(1.0, 2 / self.d_model)

    def table(self, n: int | None = None) -> Table:
        """The planes of frequencies and those of principal components, the one with the largest variance first."""
        rows = []
        for i, k in enumerate(self.frequencies.tolist()):
            values = (float(of[i]) for of in (self.variance, self.pure, self.roundness))
            rows.append((f"frequency {k}", k, *values, distinguished(self.modulus, [k])))
        for i, k in enumerate(self.component_frequency.tolist()):
            values = (float(of[i]) for of in (self.component_variance, self.component_pure))
            rows.append((f"components {2 * i + 1}, {2 * i + 2}", k, *values, None, distinguished(self.modulus, [k])))
        rows.sort(key=lambda row: -row[2])
        columns = ("plane", "frequency", "variance", "of this frequency", "roundness", "points")
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """The numbers in each plane; the colour is frequency times number modulo p, which a circle has in order."""
        from hooklens.viz.curves import scatter
        from hooklens.viz.small_multiples import panels

        directions = "first direction of the plane", "second direction"
        named = [
            (f"plane of frequency {k}", k, directions, *of)
            for k, *of in self._drawn(self.frequencies, self.planes, "variance")
        ]
        pairs = self._drawn(self.component_frequency, self.components, "component_variance")
        for i, (k, *of) in enumerate(pairs):
            axes = f"principal component {2 * i + 1}", f"principal component {2 * i + 2}"
            named.append((f"principal components (mostly frequency {k})", k, axes, *of))
        drawn = []
        for name, k, (across, up), points, variance in named:
            order = (torch.arange(self.modulus) * k % self.modulus).double()
            title = f"Embedding of the numbers, {name}: {variance:.1%} of the variance"
            axes_and_colour: dict[str, Any] = {"x_title": across, "y_title": up, "colour": order, "cyclic": True}
            of_plane = points[:, 0], points[:, 1], range(self.modulus), title
            figure = scatter(*of_plane, colourbar="k n mod p", **axes_and_colour)
            drawn.append(figure.update_layout(showlegend=False))
        stacked = panels(drawn)
        for i, axis in enumerate(stacked.select_yaxes()):
            axis.update(scaleanchor=f"x{i + 1}" if i else "x")  # a circle is drawn round
        return stacked

    def _drawn(self, frequencies: Tensor, points: Tensor, variance: str) -> zip:
        return zip(frequencies.tolist(), points, getattr(self, variance).tolist(), strict=True)


def project_embedding(
    model: HookedTransformer, data: Task, *, frequencies: Sequence[int], n_components: int = 4
) -> Circles:
    """Do the numbers lie on circles? Their embeddings in each frequency's plane and on principal components.

    `n_components` is an even number of principal components, drawn in pairs.

    >>> from hooklens.testing import tiny_model
    >>> circles = project_embedding(tiny_model(d_vocab=8), 7, frequencies=[1, 2])
    >>> circles.planes.shape, circles.components.shape
    (torch.Size([2, 7, 2]), torch.Size([2, 7, 2]))

    A filter that keeps one frequency of the rows would give an ellipse for random weights too. Compare `variance`
    with `chance`, what such a plane holds of a random embedding on average: 2 / (p - 1) of the variance has the
    frequency, and 2 / d_model of the rest lies in any plane.

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", figure 1; Liu et
    al. (2022), "Towards Understanding Grokking", figure 1, for principal components.
    """
    p = modulus_of(data)
    chosen = checked_frequencies(frequencies, p)
    if 2 * chosen[-1] == p:
        raise InputError(
            f"frequency {chosen[-1]} is half of p = {p}: it alternates between two points on a line and has no circle; "
            f"give frequencies from 1 to {(p - 1) // 2}"
        )
    rows = embedding_rows_of(model, p)
    centred, total = rows - rows.mean(0), (rows - rows.mean(0)).square().sum()
    planes = [_plane(centred, k) for k in chosen]
    if whole("n_components", n_components, 2) % 2:
        raise ArgumentError("{n_components} are drawn in pairs, so that their number is even; got {0}", n_components)
    components = _components(centred, n_components)
    powers, squares = frequency_power(components.movedim(0, 1)).sum(-1).T, components.square().sum((1, 2))
    return Circles(
        modulus=p,
        frequencies=torch.tensor(chosen),
        planes=torch.stack([points for points, _, _ in planes]),
        variance=torch.stack([points.square().sum() for points, _, _ in planes]) / total,
        pure=torch.stack([pure for _, pure, _ in planes]),
        roundness=torch.stack([roundness for _, _, roundness in planes]),
        components=components,
        component_variance=squares / total,
        component_frequency=powers.argmax(1) + 1,
        component_pure=powers.amax(1) / squares,
        d_model=rows.shape[1],
    )


def _components(centred: Float[Tensor, "p d_model"], n: int) -> Float[Tensor, "pair p 2"]:
    """The rows on the first principal components, in pairs."""
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    return (left * singular)[:, : 2 * (min(n, len(singular)) // 2)].unflatten(1, (-1, 2)).movedim(1, 0)


def _plane(centred: Float[Tensor, "p d_model"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points in the plane of a frequency, how much of their variance has it, and how round that part is."""
    waves = transform(centred)[2 * k - 1 : 2 * k + 1]  # the directions of cosine and sine
    _, radii, across = torch.linalg.svd(waves, full_matrices=False)
    points = centred @ across.T
    pure = frequency_power(points)[k - 1].sum() / points.square().sum()
    return points, pure, radii[1] / radii[0]


def demo(model: HookedTransformer) -> Circles | Needs:
    """The plane of frequency 1, for the model's tokens."""
    p = demo_modulus(model)
    return p if isinstance(p, Needs) else project_embedding(model, p, frequencies=[1])
