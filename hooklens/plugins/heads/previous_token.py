"""Do positions alone make a head attend to the previous token? W_pos W_Q W_K^T W_pos^T, or its rotary equivalent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.component import head_name
from hooklens.core.errors import InputError
from hooklens.core.precision import widened
from hooklens.core.progress_bar import tracked
from hooklens.data.repeated import repeated_tokens
from hooklens.model.config import Learned, Sinusoidal
from hooklens.model.embed import rotary_tables, rotate
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import Head, PerHead, head_table, ranked
from hooklens.plugins.heads.which import captured, check_model
from hooklens.plugins.weights.matrices import heads_of
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import Tested

Vectors = Float[Tensor, "draw pos head d_head"]
_DRAWS = 999  # the smallest p is 0.001: the rows of a head are not independent, so each head needs its own null
_AT_ONCE = 2**22  # scores of rotated heads kept at a time


@dataclass(frozen=True, eq=False)
class PositionScores(Tested, Result):
    """The score from each query position to each key position due to positions alone, and the place of its maximum.

    `scores` is `[layer head query key]`, up to `n_pos` positions. `share` is the share of rows p >= 1 whose maximum
    over keys 0..p lies at p - 1; `chance` is that of scores in random order. A previous-token head by position needs,
    for every p, w_p W_Q W_K^T w_{p-1}^T > w_p W_Q W_K^T w_j^T for every other j <= p. `p` is how often the same head
    with randomly rotated queries has as large a share (for equal shares, as large a margin). Rows are correlated, so
    with rotary positions one head in a few reaches a share of 1 by chance.
    """

    ranked_by = "attention to the previous token by position alone"

    baselines = ("chance",)
    scores: Float[Tensor, "layer head query_pos key_pos"]
    p: PerHead
    how: str

    @property
    def share(self) -> PerHead:
        """The share of rows whose causal maximum is the previous position; ties are shared out evenly."""
        return _share(self.scores)

    @property
    def chance(self) -> float:
        """The mean of 1 / (p + 1) over rows."""
        n = self.scores.shape[-1]
        return float((1 / torch.arange(2, n + 1, dtype=torch.float64)).mean())

    @property
    def margin(self) -> PerHead:
        """The score of the previous position minus the best of the others, mean over rows, in softmax nats."""
        return _margin(self.scores)

    def _ranking(self) -> PerHead:
        return self.share.double() * 1e6 + self.margin.double().clamp(-1e5, 1e5)

    def order(self) -> list[Head]:
        """Every (layer, head), the largest share first, then the largest margin."""
        return ranked(self._ranking())

    def table(self, n: int | None = 12) -> Table:
        """One row per head: the share of rows, the margin, and the comparison with rotated queries."""
        share = f"rows with maximum at p - 1 (chance {self.chance:.3f})"
        return head_table(self._ranking(), {share: self.share, "margin": self.margin, "p": self.p, "q": self.q}, n)

    def figure(self) -> Any:
        """The score by position of the head that positions drive most, causal part only."""
        from hooklens.viz.figures import heatmap

        layer, head = self.order()[0]
        shown = self.scores[layer, head].masked_fill(~_causal(self.scores), torch.nan)
        shown = shown - shown.nanmean(-1, keepdim=True)
        title = f"{head_name(layer, head)}: {self.how}, row mean taken away"
        return heatmap(shown, title=title, x_title="key position", y_title="query position", colourbar="score")


def _causal(scores: Tensor) -> Bool[Tensor, "query_pos key_pos"]:
    n = scores.shape[-1]
    return torch.ones(n, n, dtype=torch.bool, device=scores.device).tril()


def _share(scores: Float[Tensor, "*lead query_pos key_pos"]) -> Float[Tensor, "*lead"]:
    seen = scores.masked_fill(~_causal(scores), -torch.inf)
    best = seen == seen.amax(-1, keepdim=True)
    hit = best.diagonal(offset=-1, dim1=-2, dim2=-1).to(seen)
    return (hit / best[..., 1:, :].sum(-1)).mean(-1)


def _margin(scores: Float[Tensor, "*lead query_pos key_pos"]) -> Float[Tensor, "*lead"]:
    previous = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device).roll(-1, 1).tril()
    rest = scores.masked_fill(~_causal(scores) | previous, -torch.inf)[..., 1:, :].amax(-1)
    return (scores.diagonal(offset=-1, dim1=-2, dim2=-1) - rest).mean(-1)


def score_positions(model: HookedTransformer, *, n_pos: int = 32, n: int = 8, seed: int = 0) -> PositionScores:
    """Where would each head attend if tokens differed only by their positions?

    Learned or sinusoidal positions: the matrix W_pos W_Q W_K^T W_pos^T over the score scale, with position vectors read
    through the norm's weight (its scale, biases and a soft cap are left out). Rotary positions: the queries and keys of
    `n` random sequences, averaged per head over tokens and positions except the first, then rotated by their angles.
    The kernel then depends on the distance only, so the share of rows is near 1 if distance 1 scores highest, and near
    0 otherwise. `seed` also draws the rotations for the p-values.

    >>> from hooklens.testing import induction_model
    >>> found = score_positions(induction_model())
    >>> found.share[0, 0].item(), found.p[0, 0].item(), found.p[0, 1].item()    # a head without queries is never better
    (1.0, 0.001..., 1.0)

    Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits" (positional QK circuit).
    """
    check_model(model, "score_positions")
    n_pos = min(whole("n_pos", n_pos), model.cfg.n_ctx)
    if n_pos < 2:
        raise InputError(f"a previous token needs at least two positions, got n_pos {n_pos} (n_ctx {model.cfg.n_ctx})")
    table = isinstance(model.cfg.positional_embedding_type, Learned | Sinusoidal)
    layers = range(model.cfg.n_layers)
    if not table and any(model.cfg.rotary_at(layer) is None for layer in layers):
        raise InputError("score_positions needs a position signal in every layer; this model has layers without one")
    scores, p = [], []
    with torch.no_grad():
        means = None if table else _queries_and_keys(model, n, seed)
        for layer in tracked(layers, "heads by position", "layers"):
            if means is None:
                q, score = _from_table(model, layer, n_pos)
            else:
                q, score = _from_rotary(model, layer, n_pos, *means[layer])
            scores.append(score(q)[0])
            p.append(_p(scores[-1], q, score, seeded(seed, layer, stride=1_000_003)))
    how = "W_pos W_Q W_K^T W_pos^T" if table else "rotary kernel of mean query and key"
    return PositionScores(torch.stack(scores), torch.stack(p), how)


def _p(seen: Tensor, q: Vectors, score: Callable[[Vectors], Tensor], draw: torch.Generator) -> Float[Tensor, "head"]:
    """The share of rotated queries whose share, then margin, is as large, counting the head's own."""
    heads, d = q.shape[2:]
    share, margin, slack = _share(seen), _margin(seen), 1e-6 * seen.abs().amax((-1, -2))
    # only the images of these few vectors are needed from a rotation: as many orthonormal directions, drawn at random
    left, size, _ = torch.linalg.svd(q[0].transpose(0, 1).double(), full_matrices=False)
    drawn = torch.randn(_DRAWS, heads, d, size.shape[1], generator=draw).double()
    Q, R = torch.linalg.qr(drawn)
    turns = (Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT.to(q)
    spread = (left * size[:, None]).to(q)
    reached = torch.ones_like(share)
    for some in turns.split(max(1, _AT_ONCE // seen.numel())):
        null = score(torch.einsum("hpr,thrd->tphd", spread, some))
        shares, margins = _share(null), _margin(null)
        equal = (shares - share).abs() < 1e-6
        reached += ((shares > share + 1e-6) | (equal & (margins >= margin - slack))).sum(0)
    return reached.double() / (_DRAWS + 1)


def _from_table(model: HookedTransformer, layer: int, n_pos: int) -> tuple[Vectors, Callable[[Vectors], Tensor]]:
    """The queries of positions, and the function that scores such queries against the keys of positions."""
    if model.cfg.qk_norm is not None:
        raise InputError("W_Q W_K^T cannot be used where queries are normalised; score_heads measures the attention")
    w, block, heads = widened(model.W_pos[:n_pos]), model.blocks[layer], heads_of(model, layer)
    reads = block.reads_through("attn")
    q, k = (torch.einsum("pm,hmd->phd", w, reads.folded(matrix)) for matrix in (heads.Q, heads.K))
    return q[None], lambda x: torch.einsum("tphd,khd->thpk", x, k) / block.attn.scale


def _queries_and_keys(model: HookedTransformer, n: int, seed: int) -> list[list[Float[Tensor, "head d_head"]]]:
    """Each layer's mean query and key over tokens and positions except the first, before the rotary rotation."""
    _, cache = captured(model, repeated_tokens(model, n, seed=seed).tokens, ["q", "k"])
    means = []
    for layer, block in enumerate(model.blocks):
        of_layer = []
        for name, norm in (("q", block.attn.q_norm), ("k", block.attn.k_norm)):
            act = cache[name, layer] if norm is None else norm(cache[name, layer])
            of_layer.append(widened(act)[:, 1:].mean((0, 1)))
        means.append(of_layer)
    return means


def _from_rotary(
    model: HookedTransformer,
    layer: int,
    n_pos: int,
    q: Float[Tensor, "head d_head"],
    k: Float[Tensor, "kv_head d_head"],
) -> tuple[Vectors, Callable[[Vectors], Tensor]]:
    """The same for the mean query and key of a layer, turned by the angles of the positions."""
    attn, rotary = model.blocks[layer].attn, model.cfg.rotary_at(layer)
    assert rotary is not None  # checked by the caller
    tables = rotary_tables(rotary, attn.d_head, torch.arange(n_pos, device=q.device), q.dtype)

    def turned(x: Float[Tensor, "draw one head d_head"]) -> Vectors:
        return rotate(x.expand(-1, n_pos, -1, -1), *tables, rotary.interleaved)

    keys = turned(k[None, None])[0].repeat_interleave(len(q) // len(k), 1)
    return q[None, None], lambda x: torch.einsum("tphd,khd->thpk", turned(x), keys) / attn.scale


def demo(model: HookedTransformer) -> PositionScores | Needs:
    """Eight positions; works on any model whose every layer has a position signal."""
    lacks = needs_tokens(model)
    if lacks is not None and model.pos_embed is None:  # queries and keys of rotary positions are those of tokens
        return lacks
    return score_positions(model, n_pos=8, n=4)
