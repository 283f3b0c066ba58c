"""Spectra of weights: how many directions the embeddings and each head's QK and OV use, compared with a fresh model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.component import head_name, layer_names
from hooklens.model.linear import matrix_of
from hooklens.plugins.weights.matrices import embedding_matrix, heads_of, wide
from hooklens.results.result import Result, Table

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

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
        kept = (one.flatten(0, -2).mean(0) if one.ndim > 1 else one for one in (self.singular, self.initial))
        return Table(("number", "singular value", "at initialisation"), _numbered(*kept)).head(n)

    def figure(self) -> Any:
        """Singular values in decreasing order, each as a share of the sum; averaged if there are several matrices."""
        from hooklens.viz.curves import lines

        both = {"here": self.singular, "at initialisation": self.initial}
        shares = {name: (s / s.sum(-1, keepdim=True)).reshape(-1, s.shape[-1]).mean(0) for name, s in both.items()}
        return lines(shares, title="Spectrum", x_title="singular value, largest first", y_title="share of the sum")


@dataclass(frozen=True, eq=False)
class Spectra(Result):
    """Spectra of the embeddings by name, and of every head's QK and OV as `layer head value`; weights as stored."""

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
        found = []
        for name, one in (("QK", self.QK), ("OV", self.OV)):
            ratio = one.effective / one.initial_effective
            found += [(float(ratio[at]), name, *at) for at in _cells(ratio)]
        return [(name, layer, head) for _, name, layer, head in sorted(found)]

    def top(self, k: int = 10) -> Table:
        """The `k` heads with the lowest effective rank relative to a fresh model."""
        return Table(_COLUMNS, [self._head_row(*one) for one in self.order()[:k]])

    def table(self, n: int | None = 12) -> Table:
        """The embeddings, the means over heads, then the heads with the lowest effective rank."""
        whole = [_row(name, one) for name, one in self.embeddings.items()]
        whole += [_row(f"{name}, mean of heads", one) for name, one in (("QK", self.QK), ("OV", self.OV))]
        return Table(_COLUMNS, [*whole, *(self._head_row(*one) for one in self.order())]).head(n)

    def figure(self) -> Any:
        """The effective rank of each head's QK (left) and OV (right), as a share of a fresh model's mean."""
        from hooklens.viz.figures import heatmap

        both = [one.effective / one.initial_effective.mean() for one in (self.QK, self.OV)]
        heads = [f"{name} H{i}" for name in ("QK", "OV") for i in range(both[0].shape[1])]
        layers = layer_names(len(both[0]))
        title = "Effective rank of every head, as a share of that at initialisation"
        return heatmap(torch.cat(both, 1), x=heads, y=layers, title=title, colourbar="share", zmid=1.0)

    def _head_row(self, name: str, layer: int, head: int) -> tuple:
        one: Spectrum = getattr(self, name)
        s = Spectrum(one.singular[layer, head], one.initial.flatten(0, -2), one.shape, one.eps)
        return _row(f"{head_name(layer, head)} {name}", s)


_COLUMNS = (
    *("matrix", "shape", "rank", "rank at init", "effective rank", "effective at init"),
    *("participation", "participation at init", "largest share"),
)


def measure_spectrum(model: "HookedTransformer", *, seed: int = 0) -> Spectra:
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
    fresh = type(model)(model.cfg, seed=seed, dtype=model.dtype)
    here, initial = _all(model), _all(fresh)
    eps = torch.finfo(torch.promote_types(model.dtype, torch.float32)).eps  # half types are widened exactly: see `wide`
    made = {name: Spectrum(s, initial[name][0], shape, eps) for name, (s, shape) in here.items()}
    return Spectra({name: one for name, one in made.items() if name not in ("QK", "OV")}, made["QK"], made["OV"])


def _all(model: "HookedTransformer") -> dict[str, tuple[Values, tuple[int, int]]]:
    """Singular values and shape of each matrix, on the CPU."""
    cfg, found = model.cfg, {}
    unembed = wide(matrix_of(model.unembed.linear, cfg.d_model))
    embeddings = {"W_E": embedding_matrix(model)}
    if not cfg.tie_word_embeddings:
        embeddings["W_U"] = unembed.mT
    if model.pos_embed is not None:
        embeddings["W_pos"] = wide(model.W_pos)
    for name, matrix in embeddings.items():
        found[name] = _singular(matrix), (matrix.shape[0], matrix.shape[1])
    if cfg.tie_word_embeddings:
        found["W_U"] = found["W_E"][0], (cfg.d_model, cfg.d_vocab_out)
    each = [heads_of(model, layer) for layer in range(cfg.n_layers)]
    for name in ("QK", "OV"):
        values = torch.stack([getattr(heads, name).svd()[1] for heads in each]).cpu()
        found[name] = values, (cfg.d_model, cfg.d_model)
    return found


def _singular(matrix: Float[Tensor, "rows columns"]) -> Values:
    """Computed from the triangular factor of the taller side: a tenth of the work if one side is a vocabulary."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R).cpu()


def _cells(grid: Float[Tensor, "layer head"]) -> list[tuple[int, int]]:
    return [(i, j) for i in range(grid.shape[0]) for j in range(grid.shape[1])]


def _numbered(*columns: Values) -> list[tuple]:
    return [(i, *values) for i, values in enumerate(zip(*(one.tolist() for one in columns), strict=True))]


def _row(name: str, one: Spectrum) -> tuple:
    ranks = [round(float(rank.double().mean())) for rank in (one.rank, one.initial_rank)]
    pairs = (one.effective, one.initial_effective), (one.participation, one.initial_participation)
    largest = (one.singular[..., 0] / one.singular.sum(-1)).mean()
    numbers = [float(value.mean()) for pair in pairs for value in pair]
    return (name, f"{one.shape[0]} x {one.shape[1]}", *ranks, *numbers, float(largest))


def demo(model: "HookedTransformer") -> Spectra:
    """Every spectrum of the model, and that of a fresh one."""
    return measure_spectrum(model)
