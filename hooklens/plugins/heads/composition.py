"""Q-, K- and V-composition of weights: which heads read what other heads write, and which pairs stand out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.component import head_name, head_names
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import in_order, known
from hooklens.plugins.heads.rotations import above
from hooklens.plugins.weights.matrices import folded_heads, need_sum
from hooklens.results.result import Result, Table
from hooklens.results.statistics import q_values

Pairs = Float[Tensor, "layer head reader_layer reader_head"]
_DRAWS = 50  # orientations of each pair, which has a product of its own for each; all pairs are pooled
MODES = ("Q", "K", "V")
_LEAST_PARTNERS = 5  # with fewer, a pair is a large part of its own writer's mean
_LEAST_CELLS = 20  # needed at one layer distance to estimate a separate spread
_EFFICIENCY = 0.37  # of the median absolute deviation, relative to the standard deviation
_SWEEPS = 30


@dataclass(frozen=True, eq=False)
class Composition(Result):
    """Composition scores of every pair of heads: the writer first, then the later head that reads; 0 for other pairs.

    `scores` are |W_OV W_QK| / (|W_OV| |W_QK|) and the like (Frobenius). `specific` measures, in robust standard
    deviations, how far a pair stands out from the means of its writer, of its reader and of pairs at the same layer
    distance; heads that merely share a few directions of the stream do not stand out. `z` compares the score with that
    of the same two matrices in random relative orientation, whose mean square is 1 / d_model for any spectra (`chance`
    is its root). `null` says which of the two `p` refers to: "orientation" if there are too few heads for the other.
    NaN where there is no pair.
    """

    ranked_by = "distance above the null"

    scores: dict[str, Pairs]
    specific: dict[str, Pairs]
    z: dict[str, Pairs]
    p: dict[str, Pairs]
    null: str
    chance: float

    @property
    def q(self) -> dict[str, Pairs]:
        """Benjamini-Hochberg over all pairs and all three modes."""
        return dict(zip(self.p, q_values(torch.stack(list(self.p.values()))), strict=True))

    def _above_null(self) -> Float[Tensor, "mode layer head reader_layer reader_head"]:
        by_mode = self.specific if self.null == "specific" else self.z
        return torch.stack([by_mode[mode] for mode in MODES])

    def order(self) -> list[tuple[str, int, int, int, int]]:
        """(mode, layer, head, reader's layer, reader's head), the pair farthest above its null first."""
        above_null = self._above_null()
        by = torch.tensor(in_order(above_null)[: int((~above_null.isnan()).sum())], dtype=torch.long)
        index = torch.stack(torch.unravel_index(by, above_null.shape), 1).tolist()
        return [(MODES[mode], *pair) for mode, *pair in index]

    def table(self, n: int | None = 12) -> Table:
        """One row a pair and mode; with one layer there is none."""
        measures = (self.scores, self.specific, self.z, self.q)
        rows = [
            (head_name(a, b), head_name(c, d), mode, *(known(float(x[mode][a, b, c, d])) for x in measures))
            for mode, a, b, c, d in self.order()[:n]
        ]
        return Table(("writer", "reader", "mode", "score", "stands out", "z", f"q ({self.null})"), rows)

    def figure(self) -> Any:
        """Writers down, readers across: how far each pair lies above its null in its largest mode."""
        from hooklens.viz.figures import heatmap

        largest = self._above_null().nan_to_num(-torch.inf).amax(0)
        names = head_names(largest.shape[0], largest.shape[1])
        grid = largest.flatten(2).flatten(0, 1)
        grid = grid.masked_fill(grid.isinf(), torch.nan if bool(grid.isfinite().any()) else 0.0)
        title = f"Composition above its null, {self.null} (largest of Q, K, V)"
        return heatmap(grid, x=names, y=names, title=title, x_title="reader", y_title="writer", colourbar="z")


def score_composition(model: HookedTransformer, *, draws: int = _DRAWS, seed: int = 0) -> Composition:
    """Which later heads read, with their queries, keys or values, what earlier heads write?

    Every matrix is kept as two thin factors. Norms, including those of queries and keys, are linearised: their weight
    (and LayerNorm's centring) is folded into the reader, and their scale is left out. Rotary rotations, position
    embeddings and biases are ignored.

    >>> from hooklens.testing import induction_model
    >>> found = score_composition(induction_model())
    >>> found.order()[0]                     # the induction head's keys read what the previous-token head wrote
    ('K', 0, 0, 1, 1)

    A pair is judged by how far it stands out among the pairs of its writer and of its reader. This needs at least five
    heads per layer. With fewer, the null is `draws` random orientations of each pair with its own spectra, and the
    draws of all pairs and modes are pooled in standard deviations.

    Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", "Q-, K-, and V-composition";
    Efron (2004), "Large-Scale Simultaneous Hypothesis Testing: The Choice of a Null Hypothesis" (empirical null).
    """
    need_sum(model)
    whole("draws", draws, 1)
    specific_null = model.cfg.n_heads >= _LEAST_PARTNERS and model.cfg.n_layers > 1
    with torch.no_grad():
        writers, readers = _factors(model)
        scores, z = _by_mode(_scores(writers, readers[mode]) for mode in MODES)
        specific = {mode: torch.full_like(z[mode], torch.nan) for mode in MODES}
        if specific_null:
            specific, p = _by_mode(standing_out(scores[mode], ~z[mode].isnan()) for mode in MODES)
        else:
            generator = seeded(seed)
            null = torch.cat([_random_z(writers, readers[mode], draws, generator) for mode in MODES])
            p = {mode: above(z[mode].double(), null).masked_fill(z[mode].isnan(), torch.nan) for mode in MODES}
    return Composition(
        scores=scores,
        specific=specific,
        z=z,
        p=p,
        null="specific" if specific_null else "orientation",
        chance=model.cfg.d_model**-0.5,
    )


def _by_mode(pairs: Iterable[tuple[Pairs, Pairs]]) -> list[dict[str, Pairs]]:
    return [dict(zip(MODES, parts, strict=True)) for parts in zip(*pairs, strict=True)]


def _factors(
    model: HookedTransformer,
) -> tuple[Float[Tensor, "layer head d_head d_model"], dict[str, Float[Tensor, "layer head d_model d_head"]]]:
    """The factors that each head writes, and that its q, k and v read, each times the triangle of its other factor.

    |A B C D| = |R (B C) S| where A = Q R and D^T = Q' S^T: rotations change no norm, and the inner product is small.
    """
    writers: list[Tensor] = []
    readers: dict[str, list[Tensor]] = {mode: [] for mode in MODES}
    for layer in range(model.cfg.n_layers):
        heads = folded_heads(model, layer)
        writers.append(_triangle(heads.V) @ heads.O)
        readers["Q"].append(heads.Q @ _triangle(heads.K).mT)
        readers["K"].append(heads.K @ _triangle(heads.Q).mT)
        readers["V"].append(heads.V @ _triangle(heads.O.mT).mT)
    return torch.stack(writers), {mode: torch.stack(parts) for mode, parts in readers.items()}


def _triangle(x: Float[Tensor, "head long d_head"]) -> Float[Tensor, "head small d_head"]:
    return torch.linalg.qr(x, mode="r").R


def _scores(
    writers: Float[Tensor, "layer head d_head d_model"], readers: Float[Tensor, "layer head d_model d_head"]
) -> tuple[Pairs, Pairs]:
    """Scores of one mode and their deviation from chance."""
    layers, d_model = len(writers), writers.shape[-1]
    norms = writers.flatten(2).norm(dim=2)[:, :, None, None] * readers.flatten(2).norm(dim=2)
    scores = torch.zeros_like(norms)
    for layer in range(1, layers):  # only earlier layers' output can be read
        inner = torch.einsum("lhdm,gme->lhgde", writers[:layer], readers[layer])
        scores[:layer, :, layer] = inner.flatten(3).norm(dim=3)
    later = torch.arange(layers)[:, None] < torch.arange(layers)
    is_pair = later[:, None, :, None].expand_as(norms).to(norms.device) & (norms > 0)
    scores = torch.where(is_pair, scores / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    mean, deviation = _moments(_spectra(writers).flatten(0, 1), _spectra(readers).flatten(0, 1), d_model)
    z = (scores.double().square().flatten(2).flatten(0, 1) - mean) / deviation
    return scores, z.view(scores.shape).masked_fill(~is_pair, torch.nan).to(scores)


def _spectra(x: Float[Tensor, "layer head a b"]) -> Float[Tensor, "layer head d_head"]:
    """Squared singular values as shares of their sum."""
    squares = torch.linalg.svdvals(x.double()).square()
    return squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)


def _moments(
    left: Float[Tensor, "writer d_head"], right: Float[Tensor, "reader d_head"], d_model: int
) -> tuple[float, Float[Tensor, "writer reader"]]:
    """Mean and deviation of the squared score over all orientations, given spectra of sum 1; NaN if it never varies.

    tr(X Q Y Q^T) with tr X = tr Y = 1 has mean 1/D and, as traceless symmetric matrices are one irreducible
    representation of the rotations, of dimension (D - 1)(D + 2)/2, variance 2 |X_0|^2 |Y_0|^2 / ((D - 1)(D + 2)).
    """
    spread = [x.square().sum(-1) - 1 / d_model for x in (left, right)]
    size = max(1, (d_model - 1) * (d_model + 2))
    deviation = (2 * spread[0].clamp_min(0)[:, None] * spread[1].clamp_min(0) / size).sqrt()
    return 1 / d_model, torch.where(deviation > 0, deviation, torch.nan)


def _random_z(
    writers: Float[Tensor, "layer head d_head d_model"],
    readers: Float[Tensor, "layer head d_model d_head"],
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "drawn"]:
    """The z of every pair with its own spectra in random orientation, for `draws` models."""
    left, right, d_model = _spectra(writers), _spectra(readers), writers.shape[-1]
    drawn = [left.new_zeros(0)]
    for layer in range(len(left) - 1):
        later = right[layer + 1 :].flatten(0, 1)
        mean, deviation = _moments(left[layer], later, d_model)
        squares = _random(left[layer], later, d_model, draws, generator)
        drawn.append(((squares - mean) / deviation).flatten())
    z = torch.cat(drawn)
    return z[z.isfinite()]


def _random(
    left: Float[Tensor, "writer d_head"],
    right: Float[Tensor, "reader d_head"],
    d_model: int,
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "draw writer reader"]:
    """Squared scores of the same spectra in random orientation: s^T (G o G) t for G between two random frames.

    Every writer and reader gets its own random frame. With a shared frame, the pairs of a draw would vary together, and
    many pairs would be no better a null than one.
    """
    squares = []
    for _ in range(draws):
        frames = [
            torch.linalg.qr(torch.randn(len(x), d_model, x.shape[1], generator=generator, dtype=torch.float64)).Q.to(x)
            for x in (left, right)
        ]
        G = torch.einsum("wmi,rmj->wrij", *frames).square()
        width = G.shape[2]  # d_model where a head is wider than the stream
        squares.append(torch.einsum("wi,wrij,rj->wr", left[:, :width], G, right[:, :width]))
    return torch.stack(squares)


# -- pairs that stand out after removing the mean of their writer and of their reader


def standing_out(scores: Pairs, is_pair: Bool[Tensor, "layer head reader_layer reader_head"]) -> tuple[Pairs, Pairs]:
    """How far each pair lies above writer, reader and layer distance, in robust deviations; and its one-sided p.

    Logarithms of scores are fitted by one level per writer and one per reader. The residuals are centred and scaled by
    median and absolute deviation among pairs of the same layer distance. This scale is itself uncertain, so p comes
    from Student's t with the degrees of freedom of the scale: with few heads a normal tail would call pairs of random
    weights significant (in one model in four, with 3 layers of 6 heads). A pair with score 0 has p = 1.

    >>> scores = torch.rand(2, 6, 2, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    >>> scores[0, 2, 1, 3] = 20.0
    >>> pair = torch.zeros(2, 6, 2, 6, dtype=torch.bool); pair[0, :, 1] = True
    >>> z, p = standing_out(scores, pair)
    >>> bool(z[0, 2, 1, 3] == z.nan_to_num(-9).max()), bool(p[0, 2, 1, 3] < 0.001)
    (True, True)

    Reference: Rousseeuw and Croux (1993), "Alternatives to the Median Absolute Deviation", table 1 (its efficiency).
    """
    layer = torch.arange(len(scores), device=scores.device)
    distance = (layer - layer[:, None])[:, None, :, None].expand_as(scores).flatten(2).flatten(0, 1)
    flat, pair = (x.flatten(2).flatten(0, 1) for x in (scores.double(), is_pair))
    usable = pair & (flat > 0)
    left = torch.where(usable, flat.log(), torch.nan)
    for _ in range(_SWEEPS):  # pairs exist for later readers only, so the two levels are not orthogonal
        for axis in (1, 0):
            left = left - left.nanmean(axis, keepdim=True).nan_to_num()
    partners = 1 - 1 / torch.stack([usable.sum(1, keepdim=True).expand_as(flat), usable.sum(0).expand_as(flat)])
    left = left / partners.prod(0).clamp_min(0.1).sqrt()  # a fit to few partners leaves smaller residuals
    z, df, every = torch.full_like(left, torch.nan), torch.ones_like(left), _robust(left[usable])
    free = 1 - (usable.any(0).sum() + usable.any(1).sum() - 1) / usable.sum()  # degrees of freedom left per cell
    for layers_apart in distance[usable].unique():
        at = usable & (distance == layers_apart)
        alone = int(at.sum()) >= _LEAST_CELLS
        middle, spread = _robust(left[at]) if alone else every
        z[at] = (left[at] - middle) / spread
        df[at] = (_EFFICIENCY * free * (at if alone else usable).sum()).clamp_min(1).to(df)
    p = torch.where(usable, _t_tail(z, df), torch.where(pair, 1.0, torch.nan))
    return z.view(scores.shape).to(scores), p.view(scores.shape).double()


def _t_tail(t: Float[Tensor, "*cell"], df: Float[Tensor, "*cell"]) -> Float[Tensor, "*cell"]:
    """The upper tail of Student's t: within 5 % down to 1e-4 from 5 degrees of freedom on, too large farther out.

    >>> _t_tail(torch.tensor(2.262), torch.tensor(9.0)).item()
    0.025...

    Reference: Wallace (1959), "Bounds on Normal Approximations to Student's and the Chi-Square Distributions".
    """
    z = (8 * df + 1) / (8 * df + 3) * (df * torch.log1p(t.square() / df)).sqrt()
    return torch.special.ndtr(-t.sign() * z)


def _robust(x: Float[Tensor, "cell"]) -> tuple[Tensor, Tensor]:
    """Median, and the deviation that a normal distribution with this median absolute deviation has."""
    if not len(x):
        return x.new_tensor(0.0), x.new_tensor(torch.nan)
    middle = x.median()
    spread = 1.4826 * (x - middle).abs().median()
    return middle, torch.where(spread > 0, spread, torch.nan)


def demo(model: HookedTransformer) -> Composition:
    """Every pair of heads; with one layer there are none, and the table is empty."""
    return score_composition(model, draws=20)
