"""Neurons as token lists: which tokens each reads and writes, compared with random vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hooklens.core.component import neuron_name
from hooklens.core.errors import InputError
from hooklens.core.progress_bar import progress
from hooklens.model.ids import as_ids
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.weights.matrices import Asked, folded_neurons, read_mlp
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.plugins.weights.ranked_tokens import Side, TokenLists, list_tokens, listed, mark_null
from hooklens.plugins.weights.singular_directions import reading_side, writing_side
from hooklens.results.result import Result, Table
from hooklens.results.statistics import q_values

_DRAWS = 1000  # random vectors: each is multiplied with the whole vocabulary


@dataclass(frozen=True, eq=False)
class NeuronTokens(Result):
    """Read and write lists of a layer's neurons; `gate` for gated MLPs, where the gate decides whether a neuron fires.

    `in_out` is the cosine of a neuron's read vector (the gate, if there is one) and its write vector: above 0 the
    neuron amplifies what it reads, below 0 it removes it. For random vectors its standard deviation would be `chance`.
    """

    ranked_by = "how peaked its write list is"

    layer: int
    neurons: Int[Tensor, "neuron"]
    reads: TokenLists
    gate: TokenLists | None
    writes: TokenLists
    in_out: Float[Tensor, "neuron"]
    chance: float

    @property
    def lists(self) -> list[TokenLists]:
        """The available lists: reads, gate, writes."""
        return [tokens for tokens in (self.reads, self.gate, self.writes) if tokens is not None]

    @property
    def q(self) -> Float[Tensor, "side neuron"]:
        """False discovery rates of "more peaked than a random vector", over all lists of all neurons here."""
        return q_values(torch.stack([tokens.p for tokens in self.lists]))

    def order(self) -> list[int]:
        """Indices of the neurons, the most peaked write list first."""
        return self.writes.kurtosis.argsort(descending=True, stable=True).tolist()

    def table(self, n: int | None = 10) -> Table:
        """One row per neuron: its top read and write tokens, and how peaked the lists are compared with chance."""
        lists, q = self.lists, self.q[-1]
        names = [tokens.name for tokens in lists]
        peaked = [f"kurtosis {name}" for name in names]
        rows = []
        for i in self.order()[:n]:
            words = [listed(tokens.words(i)) for tokens in lists]
            least = listed(self.writes.words(i, high=False))
            kurtosis = [float(tokens.kurtosis[i]) for tokens in lists]
            name = neuron_name(self.layer, int(self.neurons[i]))
            rows.append((name, *words, least, *kurtosis, float(q[i]), float(self.in_out[i])))
        return Table(("neuron", *names, "writes least", *peaked, "q writes", "in-out cosine"), rows)

    def figure(self) -> Any:
        """Every neuron by how peaked its read and write lists are; dashed: the 95th percentile of random vectors."""
        from hooklens.viz.curves import scatter

        read = self.reads if self.gate is None else self.gate
        names = [f"N{int(n)} writes {listed(self.writes.words(i)[:4])}" for i, n in enumerate(self.neurons)]
        title = f"Neurons of layer {self.layer}: which token lists are more peaked than random?"
        x, y, x_title = read.kurtosis, self.writes.kurtosis, f"excess kurtosis of what it {read.name}"
        colour, colourbar, y_title = self.in_out, "in-out cosine", "of what it writes"
        figure = scatter(x, y, names, title, x_title=x_title, y_title=y_title, colour=colour, colourbar=colourbar)
        return mark_null(figure, read.kurtosis_null, self.writes.kurtosis_null)


def read_neurons(
    model: HookedTransformer,
    layer: Asked,
    neurons: Sequence[int] | Tensor | None = None,
    *,
    top: int = 8,
    draws: int = _DRAWS,
    seed: int = 0,
) -> NeuronTokens:
    """Which tokens make each neuron of an MLP fire, and which does it then promote? Compared with random vectors.

    Reading is computed for a stream that contains only one token's embedding, with the norm's weight folded in. Writing
    is the logits that the neuron's output vector adds, with the final norm's weight folded in and its scale left out.
    `None` means all neurons.

    >>> from hooklens.testing import tiny_model
    >>> found = read_neurons(tiny_model(), 0, [3, 5], top=2)
    >>> found.reads.high.shape, found.gate is None
    (torch.Size([2, 2]), True)

    Reference: Geva et al. (2022), "Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the
    Vocabulary Space", section 3; Gurnee et al. (2024), "Universal Neurons in GPT2 Language Models", section 5.
    """
    layer = read_mlp(model, layer)
    block, matrices = model.blocks[layer], folded_neurons(model, layer)
    chosen = _chosen(model, neurons)
    at = chosen.to(matrices.reads.device)
    reading = reading_side(model, block.reads_through("mlp"), seed=seed, draws=draws)
    jobs: list[tuple[Side, Tensor]] = [(reading, matrices.reads.mT[at])]
    if matrices.gate is not None:
        jobs.append((reading._replace(name="gate"), matrices.gate.mT[at]))
    jobs.append((writing_side(model, block.writes_through("mlp"), seed=seed, draws=draws), matrices.writes[at]))
    with progress(f"neurons of layer {layer}", len(jobs) * len(at), unit="list") as advance:
        reads, *gate, writes = [list_tokens(model, side, rows, top=top, advance=advance) for side, rows in jobs]
    return NeuronTokens(
        layer=layer,
        neurons=chosen,
        reads=reads,
        gate=gate[0] if gate else None,
        writes=writes,
        in_out=cosine_similarity(jobs[-2][1], jobs[-1][1], dim=1).cpu(),
        chance=model.cfg.d_model**-0.5,
    )


def _chosen(model: HookedTransformer, neurons: Sequence[int] | Tensor | None) -> Int[Tensor, "neuron"]:
    d_mlp = model.cfg.d_mlp
    if neurons is None:
        return torch.arange(d_mlp)
    what = f"neurons must be a list of indices from 0 to {d_mlp - 1}"
    chosen = as_ids(list(neurons) if isinstance(neurons, range) else neurons, what).cpu()
    if chosen.ndim != 1 or not len(chosen) or not 0 <= int(chosen.min()) <= int(chosen.max()) < d_mlp:
        raise InputError(f"{what}, got {neurons!r:.60}")
    return chosen


def demo(model: HookedTransformer) -> NeuronTokens | Needs:
    """The first layer's first 16 neurons; a model without MLPs has none."""
    lacks = lacking(model, mlp=True)
    return lacks or read_neurons(model, 0, range(min(16, model.cfg.d_mlp)), top=min(5, model.cfg.d_vocab))
