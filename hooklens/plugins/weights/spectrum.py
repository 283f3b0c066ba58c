"""Spectra of weights: how many directions the embeddings and each head's QK and OV use, compared with a fresh model."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.component import head_name, layer_names
from hooklens.model.linear import matrix_of
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.plugins.weights.matrices import embedding_matrix, heads_of, wide
from hooklens.results.result import Result, Table

Values = Float[Tensor, "*lead value"]


def effective_rank(singular: Values) -> Float[Tensor, "*lead"]:
    """exp of the entropy of the singular values as shares of their sum: k for k equal ones, 1 for one; NaN for none.

    >>> [round(effective_rank(torch.tensor(s)).item(), 4) for s in ([2.0, 2.0, 2.0], [5.0, 0.0], [3.0, 1.0])]
    [3.0, 1.0, 1.7548]

    Reference: Roy and Vetterli (2007), "The effective rank: a measure of effective dimensionality", definition 1.
    """
    share = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def participation_ratio(singular: Values) -> Float[Tensor, "*lead"]:
    """(sum of squares)^2 / sum of fourth powers: also k for k equal ones, but it counts large values more.

    >>> [round(participation_ratio(torch.tensor(s)).item(), 4) for s in ([2.0, 2.0, 2.0], [5.0, 0.0], [3.0, 1.0])]
    [3.0, 1.0, 1.2195]
    """
    share = singular.square() / singular.square().sum(-1, keepdim=True)
    return 1 / share.square().sum(-1)


def numerical_rank(singular: Values, shape: tuple[int, int], eps: float) -> Int[Tensor, "*lead"]:
    """The number of singular values above max(shape) * eps of the largest: those that are not rounding error.

    >>> numerical_rank(torch.tensor([1.0, 1e-3, 1e-9]), (3, 3), 1.2e-7).item()
    2

    Reference: Golub and Van Loan (2013), "Matrix Computations", section 5.4.1.
    """
    return (singular > singular[..., :1] * max(shape) * eps).sum(-1)


@dataclass(frozen=True, eq=False)
class Spectrum(Result):
    """Singular values of one matrix, or of one per layer and head, and those of a fresh model."""

    singular: Float[Tensor, "*lead value"]
    initial: Float[Tensor, "*fresh value"]
    shape: tuple[int, int]
    eps: float

    @property
    def rank(self) -> Int[Tensor, "*lead"]:
        """The numerical rank."""
        return numerical_rank(self.singular, self.shape, self.eps)

    @property
    def initial_rank(self) -> Int[Tensor, "*lead"]:
        """The numerical rank at initialisation."""
        return numerical_rank(self.initial, self.shape, self.eps)

    @property
    def effective(self) -> Float[Tensor, "*lead"]:
        """The effective rank."""
        return effective_rank(self.singular)

    @property
    def initial_effective(self) -> Float[Tensor, "*lead"]:
        """The effective rank at initialisation."""
        return effective_rank(self.initial)

    @property
    def participation(self) -> Float[Tensor, "*lead"]:
        """The participation ratio."""
        return participation_ratio(self.singular)

    @property
    def initial_participation(self) -> Float[Tensor, "*lead"]:
        """The participation ratio at initialisation."""
        return participation_ratio(self.initial)

    def table(self, n: int | None = 20) -> Table:
        """One row per singular value, averaged over layers and heads if there are several."""
        here, initial = (values.reshape(-1, values.shape[-1]).mean(0) for values in (self.singular, self.initial))
        rows = [(i, *pair) for i, pair in enumerate(zip(here.tolist(), initial.tolist(), strict=True))]
        return Table(("number", "singular value", "at initialisation"), rows).head(n)

    def figure(self) -> Any:
        """Singular values in decreasing order, each as a share of the sum; averaged if there are several matrices."""
        from hooklens.viz.curves import lines

        both = {"here": self.singular, "at initialisation": self.initial}
        shares = {name: (s / s.sum(-1, keepdim=True)).reshape(-1, s.shape[-1]).mean(0) for name, s in both.items()}
        return lines(shares, title="Spectrum", x_title="singular value, largest first", y_title="share of the sum")


@dataclass(frozen=True, eq=False)
class Spectra(Result):
    """Spectra of the embeddings by name, and of every head's QK and OV as `layer head value`; weights as stored."""

    ranked_by = "effective rank of a head against a fresh model, the lowest first"
    terms = {
        "rank at init": "the same for a random matrix of this shape, as before training",
        "effective at init": "the same for a random matrix of this shape, as before training",
        "participation at init": "the same for a random matrix of this shape, as before training",
    }

    embeddings: dict[str, Spectrum]
    QK: Spectrum
    OV: Spectrum

    def order(self) -> list[tuple[str, int, int]]:
        """Every (matrix, layer, head), the lowest effective rank relative to initialisation first."""
        ratios = {name: getattr(self, name).effective / getattr(self, name).initial_effective for name in ("QK", "OV")}
        n_layers, n_heads = ratios["QK"].shape
        places = product(ratios, range(n_layers), range(n_heads))
        return sorted(places, key=lambda place: (float(ratios[place[0]][place[1:]]), *place))

    @property
    def ranking(self) -> Float[Tensor, "row"]:
        """The heads in the order of the table; embeddings and means have no rank."""
        whole = torch.full((len(self.embeddings) + 2,), torch.nan)
        return torch.cat((whole, -torch.arange(float(len(self.order())))))

    def table(self, n: int | None = 12) -> Table:
        """The embeddings, the means over heads, then the heads with the lowest effective rank."""
        whole = self.embeddings | {"QK, mean of heads": self.QK, "OV, mean of heads": self.OV}
        rows = [_row(name, spectrum) for name, spectrum in whole.items()]
        return Table(_COLUMNS, [*rows, *(self._head_row(*place) for place in self.order())]).head(n)

    def figure(self) -> Any:
        """The effective rank of each head's QK (left) and OV (right), as a share of a fresh model's mean."""
        from hooklens.viz.figures import heatmap

        shares = [spectrum.effective / spectrum.initial_effective.mean() for spectrum in (self.QK, self.OV)]
        heads = [f"{name} H{i}" for name in ("QK", "OV") for i in range(shares[0].shape[1])]
        title, layers = (
            "Effective rank of every head, as a share of that at initialisation",
            layer_names(len(shares[0])),
        )
        return heatmap(torch.cat(shares, 1), x=heads, y=layers, title=title, colourbar="share", zmid=1.0)

    def _head_row(self, name: str, layer: int, head: int) -> tuple:
        heads: Spectrum = getattr(self, name)
        return _row(f"{head_name(layer, head)} {name}", replace(heads, singular=heads.singular[layer, head]))


_COLUMNS = (
    *("matrix", "shape", "rank", "rank at init", "effective rank", "effective at init"),
    *("participation", "participation at init", "largest share"),
)


def measure_spectrum(model: HookedTransformer, *, seed: int = 0) -> Spectra:
    """How many directions do the embeddings and each head's QK and OV use, compared with a freshly initialised model?

    QK and OV stay factored: no d_model x d_model matrix is formed. Weights are used as stored; for what a head reads
    from the raw stream, pass `fold_ln(model)`. In rotary models QK is the score of a query and a key at the same
    position.

    >>> from hooklens.testing import tiny_model
    >>> found = measure_spectrum(tiny_model())
    >>> found.OV.singular.shape                    # layer head value
    torch.Size([2, 2, 4])
    >>> found.embeddings["W_E"].initial_rank.item()        # min(d_vocab, d_model)
    8

    The fresh model draws normal weights; ranks do not depend on their scale, so it represents any normal
    initialisation.

    Reference: Roy and Vetterli (2007), "The effective rank"; Elhage et al. (2021), "A Mathematical Framework for
    Transformer Circuits", QK and OV circuits.
    """
    need_hooked(model, "measure_spectrum")
    here, initial = _all(model), _all(type(model)(model.cfg, seed=seed, dtype=model.dtype))
    eps = torch.finfo(torch.promote_types(model.dtype, torch.float32)).eps  # half types are widened exactly: see `wide`
    spectra = {name: Spectrum(values, initial[name][0], shape, eps) for name, (values, shape) in here.items()}
    return Spectra(QK=spectra.pop("QK"), OV=spectra.pop("OV"), embeddings=spectra)


def _all(model: HookedTransformer) -> dict[str, tuple[Values, tuple[int, int]]]:
    """Singular values and shape of each matrix, on the CPU."""
    cfg = model.cfg
    matrices = {"W_E": embedding_matrix(model)}
    if not cfg.tie_word_embeddings:
        matrices["W_U"] = wide(matrix_of(model.unembed.linear, cfg.d_model)).mT
    if model.pos_embed is not None:
        matrices["W_pos"] = wide(model.W_pos)
    decompositions = {
        name: (_singular(matrix), (matrix.shape[0], matrix.shape[1])) for name, matrix in matrices.items()
    }
    if cfg.tie_word_embeddings:
        decompositions["W_U"] = decompositions["W_E"][0], (cfg.d_model, cfg.d_vocab_out)
    layers = [heads_of(model, layer) for layer in range(cfg.n_layers)]
    for name in ("QK", "OV"):
        values = torch.stack([getattr(heads, name).svd()[1] for heads in layers]).cpu()
        decompositions[name] = values, (cfg.d_model, cfg.d_model)
    return decompositions


def _singular(matrix: Float[Tensor, "rows columns"]) -> Values:
    """Computed from the triangular factor of the taller side: a tenth of the work if one side is a vocabulary."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R).cpu()


def _row(name: str, spectrum: Spectrum) -> tuple:
    ranks = [round(float(rank.double().mean())) for rank in (spectrum.rank, spectrum.initial_rank)]
    measures = (spectrum.effective, spectrum.initial_effective, spectrum.participation, spectrum.initial_participation)
    largest = (spectrum.singular[..., 0] / spectrum.singular.sum(-1)).mean()
    rows, columns = spectrum.shape
    return (name, f"{rows} x {columns}", *ranks, *(float(values.mean()) for values in measures), float(largest))


def demo(model: HookedTransformer) -> Spectra:
    """Every spectrum of the model, and that of a fresh one."""
    return measure_spectrum(model)
