"""Singular directions of a head or an MLP as tokens: what each direction reads from the stream and writes to it."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.component import head_name, layer_name
from hooklens.core.errors import InputError
from hooklens.model.norms import Passage
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.weights.matrices import (
    Asked,
    embedding_rows,
    folded_heads,
    folded_neurons,
    read_head,
    read_mlp,
    unembedding_rows,
)
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.plugins.weights.ranked_tokens import Side, TokenLists, list_tokens, listed, random_vectors
from hooklens.results.result import Result, Table
from hooklens.results.statistics import q_values

Reading = tuple[Side, Float[Tensor, "d_model rank"]]  # the tokens that the singular vectors of a side are read as
_DRAWS = 200  # random vectors: each is multiplied with the whole vocabulary


@dataclass(frozen=True, eq=False)
class SingularDirections(Result):
    """The largest singular directions of a matrix, each with its tokens on both sides.

    `left` and `right` are unit vectors of the raw stream (None if that side is neurons), with the norm before the
    matrix folded in; `lists` contains their tokens, compared with random vectors. A direction is defined up to sign:
    both sides may change sign together, so the top tokens of one side belong to the top tokens of the other, and the
    bottom tokens to the bottom tokens.
    """

    ranked_by = "singular value"

    matrix: str
    singular: Float[Tensor, "direction"]
    share: Float[Tensor, "direction"]
    left: Float[Tensor, "direction d_model"] | None
    right: Float[Tensor, "direction d_model"] | None
    lists: list[TokenLists]

    @property
    def q(self) -> Float[Tensor, "side direction"]:
        """False discovery rates of "more peaked than a random vector", over all lists of all directions here."""
        return q_values(torch.stack([tokens.p for tokens in self.lists]))

    def table(self, n: int | None = 10) -> Table:
        """Two rows per direction, one per sign: the tokens that belong together."""
        sides = [tokens.name for tokens in self.lists]
        columns = ("direction", "singular value", "share", *sides, *(f"q {side}" for side in sides))
        rows: list[tuple] = []
        for i, q in enumerate(self.q.T.tolist()):
            for high in (True, False):
                words = [listed(tokens.words(i, high=high)) for tokens in self.lists]
                rows.append((f"{i}{'+' if high else '-'}", float(self.singular[i]), float(self.share[i]), *words, *q))
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """How peaked each direction's token scores are, with the 95th percentile of random vectors."""
        from hooklens.viz.curves import lines

        values = {tokens.name: tokens.kurtosis for tokens in self.lists}
        marks = {f"random, {tokens.name}": float(tokens.kurtosis_null.quantile(0.95)) for tokens in self.lists}
        title, x_title = f"{self.matrix}: do its directions single out tokens?", "direction, largest first"
        return lines(values, title=title, x_title=x_title, y_title="excess kurtosis over tokens", marks=marks)


def ov_directions(
    model: HookedTransformer, layer: Asked, head: int | None = None, *, k: int = 10, top: int = 8, seed: int = 0
) -> SingularDirections:
    """Which tokens does a head read from the positions it attends to, and which does it then write?

    The head is `layer` and `head`, or its name alone: `ov_directions(model, "L1H0")`.

    W_V W_O, with the weight of the norm before it folded in, is a sum of terms: read u, write v, with the singular
    value as strength. Reading is computed for a stream that contains only one token's embedding, writing as the logits
    that v alone adds, without the final norm's scale.

    >>> from hooklens.testing import tiny_model
    >>> found = ov_directions(tiny_model(), 1, 0, k=2, top=3)
    >>> found.left.shape, [one.name for one in found.lists]
    (torch.Size([2, 8]), ['reads', 'writes'])

    Reference: Millidge and Black (2022), "The Singular Value Decompositions of Transformer Weight Matrices are Highly
    Interpretable"; Elhage et al. (2021), OV circuits.
    """
    layer, head = read_head(model, layer, head)
    block = model.blocks[layer]
    U, S, V = folded_heads(model, layer).OV[head].svd()
    reads = reading_side(model, block.reads_through("attn"), seed=seed)
    writes = writing_side(model, block.writes_through("attn"), seed=seed)
    return _directions(model, f"{head_name(layer, head)} OV", S, left=(reads, U), right=(writes, V), size=(k, top))


def qk_directions(
    model: HookedTransformer, layer: Asked, head: int | None = None, *, k: int = 10, top: int = 8, seed: int = 0
) -> SingularDirections:
    """Which tokens attend to which? `queries` are the left side of W_Q W_K^T, `keys` the right side.

    Both are read from the stream through the same norm, whose weight is folded in. In rotary models this is the score
    of a query and a key at the same position; at a distance it is rotated. Of q and k norms, the weight is included and
    the scale is not. Biases are left out: keys that all queries attend to alike, through b_Q W_K^T, do not appear.

    >>> from hooklens.testing import tiny_model
    >>> [one.name for one in qk_directions(tiny_model(), 1, 0, k=2, top=3).lists]
    ['queries', 'keys']

    Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", QK circuits.
    """
    layer, head = read_head(model, layer, head)
    U, S, V = folded_heads(model, layer).QK[head].svd()
    side = reading_side(model, model.blocks[layer].reads_through("attn"), seed=seed)
    left, right = (side._replace(name="queries"), U), (side._replace(name="keys"), V)
    return _directions(model, f"{head_name(layer, head)} QK", S, left=left, right=right, size=(k, top))


def mlp_read_directions(
    model: HookedTransformer, layer: Asked, *, gate: bool = False, k: int = 10, top: int = 8, seed: int = 0
) -> SingularDirections:
    """Which directions of the stream does an MLP read most strongly? Left singular vectors of W_in, or of W_gate.

    The activation function lies between reading and writing, so the directions here have no counterparts in
    `mlp_write_directions`.

    >>> from hooklens.testing import tiny_model
    >>> mlp_read_directions(tiny_model(), 0, k=2, top=3).right is None
    True
    """
    layer = read_mlp(model, layer)
    neurons = folded_neurons(model, layer)
    matrix = neurons.gate if gate else neurons.reads
    if matrix is None:
        raise InputError("this MLP has no W_gate; it has W_in and W_out")
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    reads = reading_side(model, model.blocks[layer].reads_through("mlp"), seed=seed)
    name = f"{layer_name(layer)} {'W_gate' if gate else 'W_in'}"
    return _directions(model, name, S, left=(reads, U), right=None, size=(k, top))


def mlp_write_directions(
    model: HookedTransformer, layer: Asked, *, k: int = 10, top: int = 8, seed: int = 0
) -> SingularDirections:
    """Which directions of the stream can an MLP write most strongly? Right singular vectors of W_out.

    >>> from hooklens.testing import tiny_model
    >>> mlp_write_directions(tiny_model(), 0, k=2, top=3).left is None
    True
    """
    layer = read_mlp(model, layer)
    _, S, Vh = torch.linalg.svd(folded_neurons(model, layer).writes, full_matrices=False)
    writes = writing_side(model, model.blocks[layer].writes_through("mlp"), seed=seed)
    return _directions(model, f"{layer_name(layer)} W_out", S, left=None, right=(writes, Vh.mT), size=(k, top))


def reading_side(model: HookedTransformer, reads: Passage, *, seed: int = 0, draws: int = _DRAWS) -> Side:
    """Tokens as a reader behind this norm meets them; random readers pass the norm's weight as trained ones do."""
    rows = embedding_rows(model, reads)
    return Side("reads", rows, reads.folded(random_vectors(draws, rows, seed).mT).mT)


def writing_side(model: HookedTransformer, writes: Passage, *, seed: int = 0, draws: int = _DRAWS) -> Side:
    """Tokens as the final norm and W_U score what is written; random writers pass the norm after the branch."""
    rows = unembedding_rows(model)
    return Side("writes", rows, writes.unscaled(random_vectors(draws, rows, seed)))


def _directions(
    model: HookedTransformer,
    name: str,
    S: Float[Tensor, "rank"],
    *,
    left: Reading | None,
    right: Reading | None,
    size: tuple[int, int],
) -> SingularDirections:
    k, top = whole("k", size[0], 1), size[1]
    if k > len(S):
        raise InputError(f"{name} has {len(S)} singular directions, fewer than k={k}")
    sides = [side for side in (left, right) if side is not None]
    # choose the sign for which the largest entry is positive: the decomposition leaves it open
    first = sides[0][1][:, :k]
    sign = first.gather(0, first.abs().argmax(0)[None])[0].sign()
    kept = [(vectors[:, :k] * sign).mT.contiguous() for _, vectors in sides]
    share = S.square() / S.square().sum()
    return SingularDirections(
        matrix=name,
        singular=S[:k].cpu(),
        share=share[:k].cpu(),
        left=None if left is None else kept[0].cpu(),
        right=None if right is None else kept[-1].cpu(),
        lists=[list_tokens(model, side, rows, top=top) for (side, _), rows in zip(sides, kept, strict=True)],
    )


def demo(model: HookedTransformer) -> SingularDirections | Needs:
    """The first head's OV, if weights can be read in the stream."""
    return lacking(model) or ov_directions(model, 0, 0, k=min(4, model.cfg.d_head), top=min(5, model.cfg.d_vocab))
