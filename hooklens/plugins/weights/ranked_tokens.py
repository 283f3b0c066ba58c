"""Vectors of the stream as lists of tokens, and how peaked each list is compared with that of a random vector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError
from hooklens.core.progress_bar import Advance
from hooklens.model.ids import show
from hooklens.model.transformer import HookedTransformer
from hooklens.results.result import Result, Table
from hooklens.results.statistics import null_p, q_values

_AT_ONCE = 2**23  # scores held at a time: vectors times tokens


class Side(NamedTuple):
    """The reference of a list: one row per token, and random vectors distributed like a reader or writer here."""

    name: str
    rows: Float[Tensor, "d_vocab d_model"]
    random: Float[Tensor, "draw d_model"]


@dataclass(frozen=True, eq=False)
class TokenLists(Result):
    """The highest- and lowest-scoring tokens of every vector, compared with random vectors.

    `kurtosis` is the excess kurtosis of a vector's scores over all tokens: 0 for a normal distribution, large if a few
    tokens stand out. `cosine` is the largest absolute cosine between the vector and any token's row. `kurtosis_null`
    and `cosine_null` are the same for random vectors.
    """

    name: str
    high: Int[Tensor, "vector top"]
    high_score: Float[Tensor, "vector top"]
    low: Int[Tensor, "vector top"]
    low_score: Float[Tensor, "vector top"]
    kurtosis: Float[Tensor, "vector"]
    kurtosis_null: Float[Tensor, "draw"]
    cosine: Float[Tensor, "vector"]
    cosine_null: Float[Tensor, "draw"]
    text: dict[str, str]

    @property
    def p(self) -> Float[Tensor, "vector"]:
        """How often a random vector's scores are as peaked."""
        return null_p(self.kurtosis, self.kurtosis_null[:, None].expand(-1, len(self.kurtosis)))

    @property
    def q(self) -> Float[Tensor, "vector"]:
        """`p` over this family of vectors, as false discovery rates."""
        return q_values(self.p)

    def words(self, vector: int, *, high: bool = True) -> list[str]:
        """The tokens with the highest (or lowest) score, as text."""
        return [self.text[str(i)] for i in (self.high if high else self.low)[vector].tolist()]

    def table(self, n: int | None = 10) -> Table:
        """One row per vector."""
        columns = ("vector", f"{self.name}: highest", "lowest", "kurtosis", "q", "largest cosine")
        numbers = zip(self.kurtosis.tolist(), self.q.tolist(), self.cosine.tolist(), strict=True)
        rows = [(i, listed(self.words(i)), listed(self.words(i, high=False)), *row) for i, row in enumerate(numbers)]
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """Kurtosis of every vector's scores against its largest cosine with a token; lines: 95 % of random vectors."""
        from hooklens.viz.curves import scatter

        names = [f"{i}: {listed(self.words(i)[:4])}" for i in range(len(self.kurtosis))]
        title, x_title = f"{self.name}: which vectors stand out from random ones?", "largest |cosine| with a token"
        y_title = "excess kurtosis over tokens"
        figure = scatter(self.cosine, self.kurtosis, names, title, x_title=x_title, y_title=y_title)
        return mark_null(figure, self.cosine_null, self.kurtosis_null)


def mark_null(figure: Any, x_null: Float[Tensor, "draw"], y_null: Float[Tensor, "draw"]) -> Any:
    """Add dashed lines at the 95th percentile of random vectors."""
    x, y = (float(torch.quantile(null, 0.95)) for null in (x_null, y_null))
    return figure.add_vline(x=x, line_dash="dash").add_hline(y=y, line_dash="dash")


def list_tokens(
    model: HookedTransformer,
    side: Side,
    vectors: Float[Tensor, "vector d_model"],
    *,
    top: int = 8,
    advance: Advance | None = None,
) -> TokenLists:
    """Which tokens does each vector score highest and lowest, and would a random vector's list look the same?

    >>> from hooklens.testing import tiny_model
    >>> side = Side("reads", torch.eye(8), torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    >>> found = list_tokens(tiny_model(), side, torch.tensor([[0.0, 0, 5, 0, 0, 0, 0, 1]]), top=2)
    >>> found.words(0), round(found.cosine.item(), 2), round(found.kurtosis.item(), 2)
    (['2', '7'], 0.98, 2.68)
    """
    if whole("top", top, 1) > len(side.rows):
        raise InputError(f"top must be a number of tokens from 1 to {len(side.rows)}, got {top}")
    at_once, norms = max(1, _AT_ONCE // len(side.rows)), side.rows.norm(dim=1)
    parts = []
    for chunk in vectors.split(at_once):
        scores = chunk @ side.rows.T
        high, low = scores.topk(top), scores.topk(top, largest=False)
        parts.append((high.indices, high.values, low.indices, low.values, *_shape(scores, chunk, norms)))
        if advance is not None:
            advance(len(chunk))
    high, high_score, low, low_score, kurtosis, cosine = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    null = [_shape(chunk @ side.rows.T, chunk, norms) for chunk in side.random.split(at_once)]
    kurtosis_null, cosine_null = (torch.cat(part).cpu() for part in zip(*null, strict=True))
    ids = torch.cat([high.flatten(), low.flatten()]).unique()
    return TokenLists(
        name=side.name,
        high=high,
        high_score=high_score,
        low=low,
        low_score=low_score,
        kurtosis=kurtosis,
        kurtosis_null=kurtosis_null,
        cosine=cosine,
        cosine_null=cosine_null,
        text=dict(zip(map(str, ids.tolist()), show(model, ids), strict=True)),
    )


def _shape(
    scores: Float[Tensor, "vector d_vocab"], vectors: Float[Tensor, "vector d_model"], norms: Float[Tensor, "d_vocab"]
) -> tuple[Float[Tensor, "vector"], Float[Tensor, "vector"]]:
    """Excess kurtosis of a vector's scores (0 if they are constant), and its largest absolute cosine."""
    centred = scores - scores.mean(1, keepdim=True)
    spread = centred.square().mean(1)
    tiny = torch.finfo(scores.dtype).tiny
    peaked = centred.pow(4).mean(1) / spread.square().clamp_min(tiny) - 3
    sizes = (vectors.norm(dim=1, keepdim=True) * norms).clamp_min(tiny)
    return torch.where(spread.square() > tiny, peaked, 0.0), (scores.abs() / sizes).amax(1)


def random_vectors(n: int, like: Float[Tensor, "*any d_model"], seed: int = 0) -> Float[Tensor, "draw d_model"]:
    """Vectors with independent normal entries, from their own generator.

    >>> random_vectors(2, torch.zeros(3, 4)).shape
    torch.Size([2, 4])
    """
    return torch.randn(whole("draws", n, 1), like.shape[-1], generator=seeded(seed), dtype=torch.float64).to(like)


def listed(words: Sequence[str]) -> str:
    """Tokens in one line, their spaces visible.

    >>> listed([" the", "a"])
    '·the a'
    """
    return " ".join(word.replace(" ", "·") or "∅" for word in words)
