"""Directions of the neurons in which the neuron-to-logit map reads cos and sin of w_k (a + b)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import (
    checked_frequencies,
    component_frequencies,
    component_names,
    fourier_basis,
    mean_by_sum,
    sums,
)
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.neuron_frequencies import classify_neurons
from hooklens.plugins.algorithmic.fourier.pair_table import PairTable, Task, need_neurons, own_table
from hooklens.plugins.algorithmic.fourier.progress_measures import need_keys
from hooklens.plugins.algorithmic.fourier.weight_spectra import neuron_logit_map
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table


@dataclass(frozen=True, eq=False)
class SumDirections(Result):
    """W_L = sum_k cos(w_k c) u_k + sin(w_k c) v_k + rest, and what u_k and v_k read from the neurons.

    `directions` are u and v of every frequency, one row a wave (`waves` names them). `weight_share` is the share of the
    squares of W_L in each, `explained` the share of the variance of (neurons . direction) over all pairs that the same
    wave of a + b explains, and `coefficient` the factor. `activation_share` is the share of all neurons' variance in
    this wave of a + b.
    """

    ranked_by = "share of W_L"
    terms = {
        "share of W_L": "share of the squared norm of the neuron-to-logit map in this wave of the answer",
        "explained": "share of the variance of (neurons . direction) that the same wave of a + b explains",
        "coefficient": "what the wave of a + b, with amplitude 1, is multiplied with there",
        "share of neurons": "share of the variance of all neurons in this wave of a + b",
    }

    modulus: int
    waves: list[str]
    directions: Float[Tensor, "wave neuron"]
    weight_share: Float[Tensor, "wave"]
    explained: Float[Tensor, "wave"]
    coefficient: Float[Tensor, "wave"]
    activation_share: Float[Tensor, "wave"]
    singular: Float[Tensor, "value"]

    @property
    def key_share(self) -> float:
        """The share of the squared norm of W_L in all the waves here; the rest is 1 - key_share."""
        return float(self.weight_share.sum())

    def rank(self, share: float = 0.99) -> int:
        """The number of singular values of W_L that hold this share of its squared norm."""
        held = self.singular.square().cumsum(0) / self.singular.square().sum()
        return int((held < share).sum()) + 1

    def table(self, n: int | None = None) -> Table:
        """One row a wave, the one with the largest share of W_L first."""
        columns = (self.weight_share, self.explained, self.coefficient, self.activation_share)
        order = self.weight_share.argsort(descending=True, stable=True).tolist()
        rows = [(self.waves[i], *(float(column[i]) for column in columns)) for i in order]
        return Table(("wave", "share of W_L", "explained", "coefficient", "share of neurons"), rows).head(n)

    def figure(self) -> Any:
        """The variance explained along each direction."""
        from hooklens.viz.figures import bars

        title = (
            f"Neurons along W_L's waves: variance that the same wave of a + b explains ({self.key_share:.1%} of W_L)"
        )
        return bars(self.explained, labels=self.waves, title=title, y_title="share of variance")


def read_sum_directions(
    model: HookedTransformer,
    data: Task,
    *,
    frequencies: Sequence[int] | None = None,
    layer: int = -1,
    table: PairTable | None = None,
) -> SumDirections:
    """Does the neuron-to-logit map read cos w_k (a + b) and sin w_k (a + b) from the neurons?

    `frequencies` default to those of the neurons; `table` is that of `run_pairs` of this model, if it was run
    already.

    >>> from hooklens.testing import tiny_model
    >>> found = read_sum_directions(tiny_model(d_vocab=8), 7, frequencies=[2])
    >>> found.waves, found.directions.shape
    (['cos 2', 'sin 2'], torch.Size([2, 32]))

    The weight and centring of a final norm are folded into W_L, its scale is left out.

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 4.2: W_L
    has rank about 10, and u_k . MLP(a, b) is approximately a multiple of cos w_k (a + b).
    """
    table = own_table(model, data, table, layer=layer)
    post = need_neurons(table)
    p, W_L = table.modulus, neuron_logit_map(model, table.modulus, layer=layer)
    if frequencies is None:
        frequencies = need_keys(classify_neurons(table).keys, "here")
    rows = torch.isin(component_frequencies(p), torch.tensor(checked_frequencies(frequencies, p))).nonzero()[:, 0]
    basis = fourier_basis(p)[rows]
    directions = basis @ W_L.T
    amplitude = torch.where(2 * component_frequencies(p)[rows] == p, p, p / 2).double().sqrt()
    coefficient, explained = _fitted(post @ directions.T, basis * amplitude[:, None])
    centred = post - post.mean((0, 1))
    return SumDirections(
        modulus=p,
        waves=[component_names(p)[int(row)] for row in rows],
        directions=directions,
        weight_share=directions.square().sum(1) / W_L.square().sum(),
        explained=explained,
        coefficient=coefficient,
        activation_share=(basis @ mean_by_sum(centred)).square().sum(1) * p / centred.square().sum(),
        singular=torch.linalg.svdvals(W_L),
    )


def _fitted(read: Float[Tensor, "a b wave"], waves: Float[Tensor, "wave p"]) -> tuple[Tensor, Tensor]:
    """Least squares of what each direction reads on its wave of a + b: the factor, and the variance explained."""
    target = waves[:, sums(len(read))].movedim(0, -1)
    read = read - read.mean((0, 1))
    coefficient = (read * target).sum((0, 1)) / target.square().sum((0, 1))
    rest = (read - coefficient * target).square().sum((0, 1))
    return coefficient, 1 - rest / read.square().sum((0, 1))


def demo(model: HookedTransformer) -> SumDirections | Needs:
    """Frequency 1, on the pairs of the model's tokens."""
    p = demo_modulus(model, mlp=True)
    return p if isinstance(p, Needs) else read_sum_directions(model, p, frequencies=[1])
