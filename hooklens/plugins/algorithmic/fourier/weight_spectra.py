"""Fourier spectra of weights: the embedding of the numbers, and the map from neurons to logits."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import (
    component_names,
    distinguished,
    transform,
)
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.pair_table import Task, modulus_of, need_model
from hooklens.plugins.algorithmic.fourier.sparsity import gini, inverse_participation_ratio
from hooklens.plugins.weights.matrices import embedding_matrix, folded_neurons, read_mlp, unembedding_rows
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table


def embedding_rows_of(model: HookedTransformer, p: int) -> Float[Tensor, "p d_model"]:
    """The rows of W_E that embed the numbers 0 to p - 1, without "=", in float64."""
    return embedding_matrix(need_model(model, p))[:p].double().cpu()


def neuron_logit_map(model: HookedTransformer, p: int, *, layer: int = -1) -> Float[Tensor, "neuron answer"]:
    """W_L = W_out W_U for the p answers, without "=", in float64: what each neuron adds to each logit.

    The weight and centring of a final norm are folded in, its scale is left out.

    >>> from hooklens.testing import tiny_model
    >>> neuron_logit_map(tiny_model(normalization_type=None), 10).shape
    torch.Size([32, 10])

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 4.2.
    """
    need_model(model, p)
    writes = folded_neurons(model, read_mlp(model, layer)).writes.double()
    return (writes @ unembedding_rows(model).double()[:p].T).cpu()


@dataclass(frozen=True, eq=False)
class FourierSpectrum(Result):
    """The norm of each Fourier component of the rows of W_E (over d_model) and of W_L (over neurons).

    Components are those of `fourier_basis`: the constant, cos 1, sin 1, cos 2, ... `neuron_logit` is None in a model
    without MLPs.
    """

    ranked_by = "norm in the embedding"
    terms = {"answers": "how many of the p answers waves of this frequency tell apart; all of them if p is prime"}

    embedding: Float[Tensor, "component"]
    neuron_logit: Float[Tensor, "component"] | None

    @property
    def modulus(self) -> int:
        """The modulus."""
        return len(self.embedding)

    @property
    def spectra(self) -> dict[str, Float[Tensor, "component"]]:
        """The available spectra by the name of their matrix."""
        both = {"W_E": self.embedding, "W_L": self.neuron_logit}
        return {name: norms for name, norms in both.items() if norms is not None}

    @property
    def gini_embedding(self) -> float:
        """The Gini coefficient of the norms of all p components of W_E."""
        return float(gini(self.embedding))

    @property
    def gini_neuron_logit(self) -> float:
        """The same of W_L; NaN without MLPs."""
        return float("nan") if self.neuron_logit is None else float(gini(self.neuron_logit))

    @property
    def ipr(self) -> dict[str, float]:
        """The inverse participation ratio of each spectrum's norms: ours, the published ones are those of neurons."""
        return {name: float(inverse_participation_ratio(norms)) for name, norms in self.spectra.items()}

    def by_frequency(self) -> dict[str, Float[Tensor, "frequency"]]:
        """The norm of cosine and sine together, for frequencies 1 to p // 2."""
        return {name: norms_by_frequency(norms) for name, norms in self.spectra.items()}

    def table(self, n: int | None = 12) -> Table:
        """The frequencies with the largest norm in W_E, and what share of its variance over numbers each holds."""
        norms = self.by_frequency()
        shares = {name: norm.square() / norm.square().sum() for name, norm in norms.items()}
        order = norms["W_E"].argsort(descending=True, stable=True).tolist()
        columns = ("frequency", "answers", *norms, *(f"share of {name}" for name in norms))
        values = (*norms.values(), *shares.values())
        rows = [(i + 1, distinguished(self.modulus, [i + 1]), *(float(of[i]) for of in values)) for i in order]
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """The norms of all components, a panel for each matrix."""
        from hooklens.viz.figures import bars
        from hooklens.viz.small_multiples import panels

        ginis = {"W_E": self.gini_embedding, "W_L": self.gini_neuron_logit}
        titles = {"W_E": "embedding of the numbers (W_E)", "W_L": "neuron-to-logit map (W_L)"}
        shown = range(0, self.modulus // 2 + 1, 1 if self.modulus < 40 else 5)  # every bar has its name when pointed at
        drawn = [
            bars(
                norms,
                labels=component_names(self.modulus),
                title=f"Fourier components of the {titles[name]}: Gini {ginis[name]:.2f}",
                x_title="frequency: its cosine, then its sine",
                y_title="norm",
            ).update_xaxes(tickvals=[2 * k - 0.5 for k in shown], ticktext=[str(k) for k in shown])
            for name, norms in self.spectra.items()
        ]
        return drawn[0] if len(drawn) == 1 else panels(drawn)


def norms_by_frequency(norms: Float[Tensor, "component"]) -> Float[Tensor, "frequency"]:
    """The norm of cosine and sine together, from the norms of components.

    >>> norms_by_frequency(torch.tensor([9.0, 3.0, 4.0, 0.0, 2.0])).tolist()
    [5.0, 2.0]
    """
    squares = norms[1:].square()
    padded = torch.nn.functional.pad(squares, (0, len(squares) % 2))
    return padded.view(-1, 2).sum(1).sqrt()


def measure_fourier_spectrum(model: HookedTransformer, data: Task, *, layer: int = -1) -> FourierSpectrum:
    """Which frequencies do the embedding of the numbers and the neuron-to-logit map use?

    The token "=" is left out of both. `layer` is that of the neurons.

    >>> from hooklens.testing import tiny_model
    >>> spectrum = measure_fourier_spectrum(tiny_model(d_vocab=8), 7)
    >>> spectrum.embedding.shape, spectrum.by_frequency()["W_L"].shape
    (torch.Size([7]), torch.Size([3]))

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", figure 3.
    """
    p = modulus_of(data)
    embedding = transform(embedding_rows_of(model, p)).norm(dim=1)
    has_mlp = not model.cfg.attn_only
    neuron_logit = transform(neuron_logit_map(model, p, layer=layer).T).norm(dim=1) if has_mlp else None
    return FourierSpectrum(embedding, neuron_logit)


def demo(model: HookedTransformer) -> FourierSpectrum | Needs:
    """The model's tokens as the numbers modulo d_vocab - 1 and "="."""
    p = demo_modulus(model)
    if isinstance(p, Needs):
        return p
    try:
        return measure_fourier_spectrum(model, p)
    except InputError:  # blocks whose branches are not added to the stream
        return Needs("a stream that components add to")
