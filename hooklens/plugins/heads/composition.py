"""Q-, K- and V-composition of weights: which heads read what other heads write, and which pairs stand out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.component import head_name, head_names
from hooklens.core.errors import InputError
from hooklens.core.precision import widened
from hooklens.model.linear import is_plain
from hooklens.model.norms import Passage
from hooklens.plugins.heads.rotations import above
from hooklens.plugins.heads.stand_out import LEAST_PARTNERS, standing_out
from hooklens.results.result import Result, Table
from hooklens.results.statistics import q_values

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Pairs = Float[Tensor, "layer head reader_layer reader_head"]
_DRAWS = 50  # orientations of each pair, which has a product of its own for each; all pairs are pooled
MODES = ("Q", "K", "V")


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

    def order(self) -> list[tuple[str, int, int, int, int]]:
        """(mode, layer, head, reader's layer, reader's head), the pair farthest above its null first."""
        by_null = self.specific if self.null == "specific" else self.z
        stack = torch.stack([by_null[mode] for mode in MODES])
        flat = stack.flatten()
        by = flat.nan_to_num(-torch.inf).argsort(descending=True, stable=True)[: int((~flat.isnan()).sum())]
        index = torch.stack(torch.unravel_index(by, stack.shape), 1).tolist()
        return [(MODES[m], *rest) for m, *rest in index]

    def table(self, n: int | None = 12) -> Table:
        """One row a pair and mode; with one layer there is none."""
        q, shown = self.q, (self.scores, self.specific, self.z)
        rows = [
            (head_name(a, b), head_name(c, d), mode, *(_number(x[mode][a, b, c, d]) for x in (*shown, q)))
            for mode, a, b, c, d in self.order()[:n]
        ]
        return Table(("writer", "reader", "mode", "score", "stands out", "z", f"q ({self.null})"), rows)

    def figure(self) -> Any:
        """Writers down, readers across: how far each pair lies above its null in its largest mode."""
        from hooklens.viz.figures import heatmap

        by_null = self.specific if self.null == "specific" else self.z
        z = torch.stack([by_null[mode] for mode in MODES]).nan_to_num(-torch.inf).amax(0)
        names = head_names(z.shape[0], z.shape[1])
        shown = z.flatten(2).flatten(0, 1)
        shown = (
            torch.where(shown.isinf(), torch.nan, shown) if bool(shown.isfinite().any()) else torch.zeros_like(shown)
        )
        return heatmap(
            shown,
            x=names,
            y=names,
            title=f"Composition above its null, {self.null} (largest of Q, K, V)",
            x_title="reader",
            y_title="writer",
            colourbar="z",
        )


def score_composition(model: "HookedTransformer", *, draws: int = _DRAWS, seed: int = 0) -> Composition:
    """Which later heads' queries, keys and values are set up to read what which earlier heads write?

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
    _refuse(model)
    enough = model.cfg.n_heads >= LEAST_PARTNERS and model.cfg.n_layers > 1
    with torch.no_grad():
        writers, readers = _factors(model)
        found = {mode: _mode(writers, readers[mode]) for mode in MODES}
        scores, z = ({mode: one[i] for mode, one in found.items()} for i in range(2))
        specific = {mode: torch.full_like(z[mode], torch.nan) for mode in MODES}
        if enough:
            stands = {mode: standing_out(scores[mode], ~z[mode].isnan()) for mode in MODES}
            specific, p = ({mode: one[i] for mode, one in stands.items()} for i in range(2))
        else:
            generator = seeded(seed)
            null = torch.cat([_random_z(writers, readers[mode], draws, generator) for mode in MODES])
            p = {mode: torch.where(one.isnan(), torch.nan, above(one.double(), null)) for mode, one in z.items()}
    return Composition(
        scores=scores,
        specific=specific,
        z=z,
        p=p,
        null="specific" if enough else "orientation",
        chance=model.cfg.d_model**-0.5,
    )


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def _refuse(model: "HookedTransformer") -> None:
    model.blocks[0].need_sum("composition of weights")
    for layer, block in enumerate(model.blocks):
        wrapped = [name for name in "qkvo" if not is_plain(getattr(block.attn, name))]
        if wrapped:
            raise InputError(
                f"composition reads weights, but blocks.{layer}.attn.{wrapped[0]} is not a plain linear layer; merge "
                "the adapter into it first"
            )


def _factors(
    model: "HookedTransformer",
) -> tuple[Float[Tensor, "layer head d_head d_model"], dict[str, Float[Tensor, "layer head d_model d_head"]]]:
    """The factors that each head writes, and that its q, k and v read, each times the triangle of its other factor.

    |A B C D| = |R (B C) S| where A = Q R and D^T = Q' S^T: rotations change no norm, and the inner product is small.
    """
    written: list[Tensor] = []
    readers: dict[str, list[Tensor]] = {mode: [] for mode in MODES}
    for block in model.blocks:
        attn, repeat = block.attn, model.cfg.n_heads // model.cfg.n_key_value_heads
        reads = block.reads_through("attn")
        q = Passage(attn.q_norm).unscaled(reads.folded(widened(attn.W_Q)))
        k, v = (reads.folded(widened(w)).repeat_interleave(repeat, 0) for w in (attn.W_K, attn.W_V))
        k = Passage(attn.k_norm).unscaled(k)
        o = block.writes_through("attn").unscaled(widened(attn.W_O))
        written.append(_triangle(v) @ o)
        readers["Q"].append(q @ _triangle(k).mT)
        readers["K"].append(k @ _triangle(q).mT)
        readers["V"].append(v @ _triangle(o.mT).mT)
    return torch.stack(written), {mode: torch.stack(parts) for mode, parts in readers.items()}


def _triangle(x: Float[Tensor, "head long d_head"]) -> Float[Tensor, "head small d_head"]:
    return torch.linalg.qr(x, mode="r").R


def _mode(
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
    safe = torch.where(is_pair.flatten(2).flatten(0, 1) & (deviation > 0), deviation, torch.nan)
    z = (scores.double().square().flatten(2).flatten(0, 1) - mean) / safe
    return scores, z.view(scores.shape).to(scores)


def _spectra(x: Float[Tensor, "layer head a b"]) -> Float[Tensor, "layer head d_head"]:
    """Squared singular values."""
    return torch.linalg.svdvals(x.double()).square()


def _normal(squares: Float[Tensor, "pair d_head"]) -> Float[Tensor, "pair d_head"]:
    return squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)


def _moments(
    left: Float[Tensor, "writer d_head"], right: Float[Tensor, "reader d_head"], d_model: int
) -> tuple[float, Float[Tensor, "writer reader"]]:
    """Mean and deviation of the squared score over all orientations, given the squared singular values.

    tr(X Q Y Q^T) with tr X = tr Y = 1 has mean 1/D and, as traceless symmetric matrices are one irreducible
    representation of the rotations, of dimension (D - 1)(D + 2)/2, variance 2 |X_0|^2 |Y_0|^2 / ((D - 1)(D + 2)).
    """
    spread = [_normal(x).square().sum(-1) - 1 / d_model for x in (left, right)]
    size = max(1, (d_model - 1) * (d_model + 2))
    return 1 / d_model, (2 * spread[0].clamp_min(0)[:, None] * spread[1].clamp_min(0) / size).sqrt()


def _random_z(
    writers: Float[Tensor, "layer head d_head d_model"],
    readers: Float[Tensor, "layer head d_model d_head"],
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "drawn"]:
    """The z of every pair with its own spectra in random orientation, for `draws` models."""
    left, right, d_model = _spectra(writers), _spectra(readers), writers.shape[-1]
    found = [left.new_zeros(0)]
    for layer in range(len(left) - 1):
        one, others = left[layer], right[layer + 1 :].flatten(0, 1)
        mean, deviation = _moments(one, others, d_model)
        drawn = torch.stack(_random(one, others, d_model, draws, generator))
        z = (drawn - mean) / torch.where(deviation > 0, deviation, torch.nan)
        found.append(z[z.isfinite()])
    return torch.cat(found)


def _random(
    left: Float[Tensor, "writer d_head"],
    right: Float[Tensor, "reader d_head"],
    d_model: int,
    draws: int,
    generator: torch.Generator,
) -> list[Float[Tensor, "writer reader"]]:
    """Squared scores of the same spectra in random orientation: s^T (G o G) t for G between two random frames.

    Every writer and reader gets its own random frame. With a shared frame, the pairs of a draw would vary together, and
    many pairs would be no better a null than one.
    """
    out, s, t = [], _normal(left), _normal(right)
    for _ in range(draws):
        frames = [
            torch.linalg.qr(torch.randn(len(x), d_model, x.shape[1], generator=generator, dtype=torch.float64)).Q.to(x)
            for x in (left, right)
        ]
        G = torch.einsum("wmi,rmj->wrij", *frames).square()
        width = G.shape[2]  # d_model where a head is wider than the stream
        out.append(torch.einsum("wi,wrij,rj->wr", s[:, :width], G, t[:, :width]))
    return out


def demo(model: "HookedTransformer") -> Composition:
    """Every pair of heads; with one layer there are none, and the table is empty."""
    return score_composition(model, draws=20)
