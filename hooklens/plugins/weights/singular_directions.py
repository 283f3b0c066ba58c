"""Singular directions of a head or an MLP as tokens: what each direction reads from the stream and writes to it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.component import head_name, layer_name
from hooklens.core.errors import InputError
from hooklens.model.norms import Passage
from hooklens.plugins.weights.matrices import (
    check_layer,
    embedding_rows,
    folded_heads,
    folded_neurons,
    unembedding_rows,
)
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.plugins.weights.ranked_tokens import Side, TokenLists, list_tokens, listed, random_vectors
from hooklens.results.result import Result, Table
from hooklens.results.statistics import q_values

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_DRAWS = 200  # random vectors: each is multiplied with the whole vocabulary


@dataclass(frozen=True, eq=False)
class SingularDirections(Result):
    """The largest singular directions of a matrix, each with its tokens on both sides.

    `left` and `right` are unit vectors of the raw stream (None if that side is neurons), with the norm before the
    matrix folded in; `lists` contains their tokens, compared with random vectors. A direction is defined up to sign:
    both sides may change sign together, so the top tokens of one side belong to the top tokens of the other, and the
    bottom tokens to the bottom tokens.
    """

    matrix: str
    singular: Float[Tensor, "direction"]
    share: Float[Tensor, "direction"]
    left: Float[Tensor, "direction d_model"] | None
    right: Float[Tensor, "direction d_model"] | None
    lists: list[TokenLists]

    @property
    def q(self) -> Float[Tensor, "side direction"]:
        """False discovery rates of "more peaked than a random vector", over all lists of all directions here."""
        return q_values(torch.stack([one.p for one in self.lists]))

    def table(self, n: int | None = 10) -> Table:
        """Two rows per direction, one per sign: the tokens that belong together."""
        sides = [one.name for one in self.lists]
        columns = ("direction", "singular value", "share", *(side for side in sides), *(f"q {side}" for side in sides))
        rows: list[tuple] = []
        for i, q in enumerate(self.q.T.tolist()):
            for high in (True, False):
                words = [listed(one.words(i, high=high)) for one in self.lists]
                rows.append((f"{i}{'+' if high else '-'}", float(self.singular[i]), float(self.share[i]), *words, *q))
        return Table(columns, rows).head(n)

    def top(self, k: int = 10) -> Table:
        """Both signs of the `k` largest directions."""
        return self.table(2 * k)

    def figure(self) -> Any:
        """How peaked each direction's token scores are, with the 95th percentile of random vectors."""
        from hooklens.viz.curves import lines

        values = {one.name: one.kurtosis for one in self.lists}
        marks = {f"random, {one.name}": float(torch.quantile(one.kurtosis_null, 0.95)) for one in self.lists}
        axes: dict[str, Any] = {"x_title": "direction, largest first", "y_title": "excess kurtosis over tokens"}
        return lines(values, title=f"{self.matrix}: do its directions single out tokens?", marks=marks, **axes)


def ov_directions(
    model: "HookedTransformer", layer: int, head: int, *, k: int = 10, top: int = 8, seed: int = 0
) -> SingularDirections:
    """Which tokens does a head read from the positions it attends to, and which does it then write?

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
    check_layer(model, layer, head)
    block = model.blocks[layer]
    U, S, V = folded_heads(model, layer).OV[head].svd()
    sides = [
        reading_side(model, block.reads_through("attn"), seed=seed),
        writing_side(model, block.writes_through("attn"), seed=seed),
    ]
    return _directions(model, f"{head_name(layer, head)} OV", S=S, vectors=(U, V), sides=sides, size=(k, top))


def qk_directions(
    model: "HookedTransformer", layer: int, head: int, *, k: int = 10, top: int = 8, seed: int = 0
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
    check_layer(model, layer, head)
    U, S, V = folded_heads(model, layer).QK[head].svd()
    side = reading_side(model, model.blocks[layer].reads_through("attn"), seed=seed)
    sides = [side._replace(name="queries"), side._replace(name="keys")]
    return _directions(model, f"{head_name(layer, head)} QK", S=S, vectors=(U, V), sides=sides, size=(k, top))


def mlp_read_directions(
    model: "HookedTransformer", layer: int, *, gate: bool = False, k: int = 10, top: int = 8, seed: int = 0
) -> SingularDirections:
    """Which directions of the stream does an MLP read most strongly? Left singular vectors of W_in, or of W_gate.

    The activation function lies between reading and writing, so the directions here have no counterparts in
    `mlp_write_directions`.

    >>> from hooklens.testing import tiny_model
    >>> mlp_read_directions(tiny_model(), 0, k=2, top=3).right is None
    True
    """
    check_layer(model, layer)
    found = folded_neurons(model, layer)
    matrix = found.gate if gate else found.reads
    if matrix is None:
        raise InputError("this MLP has no W_gate; it has W_in and W_out")
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    sides = [reading_side(model, model.blocks[layer].reads_through("mlp"), seed=seed)]
    return _directions(
        model, f"{layer_name(layer)} {'W_gate' if gate else 'W_in'}", S=S, vectors=(U, None), sides=sides, size=(k, top)
    )


def mlp_write_directions(
    model: "HookedTransformer", layer: int, *, k: int = 10, top: int = 8, seed: int = 0
) -> SingularDirections:
    """Which directions of the stream can an MLP write most strongly? Right singular vectors of W_out.

    >>> from hooklens.testing import tiny_model
    >>> mlp_write_directions(tiny_model(), 0, k=2, top=3).left is None
    True
    """
    check_layer(model, layer)
    _, S, Vh = torch.linalg.svd(folded_neurons(model, layer).writes, full_matrices=False)
    sides = [writing_side(model, model.blocks[layer].writes_through("mlp"), seed=seed)]
    return _directions(model, f"{layer_name(layer)} W_out", S=S, vectors=(None, Vh.mT), sides=sides, size=(k, top))


def reading_side(model: "HookedTransformer", reads: Passage, *, seed: int = 0, draws: int = _DRAWS) -> Side:
    """Tokens as a reader behind this norm meets them; random readers pass the norm's weight as trained ones do."""
    rows = embedding_rows(model, reads)
    return Side("reads", rows, reads.folded(random_vectors(draws, rows, seed).mT).mT)


def writing_side(model: "HookedTransformer", writes: Passage, *, seed: int = 0, draws: int = _DRAWS) -> Side:
    """Tokens as the final norm and W_U score what is written; random writers pass the norm after the branch."""
    rows = unembedding_rows(model)
    return Side("writes", rows, writes.unscaled(random_vectors(draws, rows, seed)))


def _directions(
    model: "HookedTransformer",
    name: str,
    S: Float[Tensor, "rank"],
    vectors: tuple[Float[Tensor, "d_model rank"] | None, Float[Tensor, "d_model rank"] | None],
    sides: list[Side],
    size: tuple[int, int],
) -> SingularDirections:
    k, top = size
    if not 1 <= k <= len(S):
        raise InputError(f"{name} has {len(S)} singular directions, fewer than k={k}")
    first = next(one for one in vectors if one is not None)
    # choose the sign for which the largest entry is positive: the decomposition leaves it open
    largest = first[:, :k].gather(0, first[:, :k].abs().argmax(0)[None])[0]
    kept = [None if one is None else (one[:, :k] * largest.sign()).mT.contiguous() for one in vectors]
    pairs = zip(sides, [one for one in kept if one is not None], strict=True)
    lists = [list_tokens(model, side, one, top=top) for side, one in pairs]
    share = S.square() / S.square().sum()
    left, right = (None if one is None else one.cpu() for one in kept)
    return SingularDirections(
        matrix=name, singular=S[:k].cpu(), share=share[:k].cpu(), left=left, right=right, lists=lists
    )


def demo(model: "HookedTransformer") -> SingularDirections | Needs:
    """The first head's OV, if weights can be read in the stream."""
    return lacking(model) or ov_directions(model, 0, 0, k=min(4, model.cfg.d_head), top=min(5, model.cfg.d_vocab))
