"""A forward pass at the last position that computes equal tokens once, for one layer and many short prompts.

With one layer, keys and values depend on nothing but a token and its position. A batch of all pairs "a b =" modulo 113
has 38,307 tokens, of which 227 are distinct.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from hooklens.model.attention import Attention
from hooklens.model.config import Causal, NoMask, Softmax, TokenEmbed
from hooklens.model.embed import soft_cap
from hooklens.model.kv_cache import Context

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_RANGE = 40.0  # of scores whose exponentials are added up without a maximum of each row
_PAYS = 2  # prompts for each token of the vocabulary: from there on few of them are the first with their token

Table = Float[Tensor, "distinct *rest"]
Places = Int[Tensor, "batch pos"]


def shares_tokens(model: "HookedTransformer", tokens: Shaped[Tensor, "batch pos *d_in"]) -> bool:
    """Whether `last_logits` computes the logits of these prompts, and saves work, for a model that runs as defined.

    >>> from hooklens.testing import tiny_model
    >>> prompts = torch.tensor([[0, 1, 2]]).expand(20, -1)
    >>> shares_tokens(tiny_model(n_layers=1, d_vocab=3), prompts), shares_tokens(tiny_model(n_layers=2), prompts)
    (True, False)
    """
    cfg = model.cfg
    if cfg.n_layers != 1 or not isinstance(cfg.embed, TokenEmbed) or model.dtype not in (torch.float32, torch.float64):
        return False
    block = model.blocks[0]
    if type(block.attn.mask) not in (Causal, NoMask) or not block.in_steps:  # a mask from outside may hide keys
        return False
    if model.dropout.active or block.dropout.active or block.attn.dropout.active:
        return False
    if tokens.shape[1] > cfg.n_ctx or len(tokens) < _PAYS * cfg.d_vocab:
        return False
    return bool((tokens[:, -1] == tokens[0, -1]).all())


def last_logits(model: "HookedTransformer", tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch 1 d_vocab"]:
    """The logits at the last position, which holds the same token in every prompt: those of the model, to rounding.

    >>> from hooklens.testing import tiny_model
    >>> model, prompts = tiny_model(n_layers=1), torch.tensor([[4, 1, 2], [1, 4, 2], [4, 4, 2]])
    >>> torch.allclose(last_logits(model, prompts), model(prompts, logits_at=-1), atol=1e-5)
    True

    Hooks would see other shapes than in the model's own pass: for code that has checked that none is open.
    """
    tokens = model._check_tokens(tokens)
    n_pos, d_vocab = tokens.shape[1], model.cfg.d_vocab
    key = tokens + d_vocab * torch.arange(n_pos, device=tokens.device)
    present = torch.zeros(n_pos * d_vocab, dtype=torch.bool, device=tokens.device)
    present[key.flatten()] = True
    distinct = present.nonzero()[:, 0]
    places = (present.cumsum(0) - 1)[key]
    # One row of all distinct tokens, whose one query is the token that is last in every prompt.
    ctx = Context((distinct // d_vocab)[None], chosen=places[0, -1:])
    block, stream = model.blocks[0], model.embed_input((distinct % d_vocab)[None], ctx)
    q, k, v = block.attn.project(block.before_attn(stream), ctx, (None, None, None))
    z = _attend(block.attn, q, k, v, places=places)
    query = ctx.select(stream).expand(len(tokens), -1, -1)
    return model.read_out(block.finish(query, block.attn_adds(block.attn.output(z))))


def _attend(
    attn: Attention,
    q: Float[Tensor, "1 1 head d_head"],
    k: Float[Tensor, "1 distinct kv_head d_head"],
    v: Float[Tensor, "1 distinct kv_head d_head"],
    *,
    places: Places,
) -> Float[Tensor, "batch 1 head d_head"]:
    """z of the query in every prompt, from the keys and values of that prompt's tokens."""
    group = attn.n_heads // attn.n_kv_heads
    k, v = (x if group == 1 else x.repeat_interleave(group, 2) for x in (k, v))
    table = soft_cap((q * k)[0].sum(-1) / attn.scale, attn.score.soft_cap)
    if type(attn.score) is Softmax and bool((table.amax(0) - table.amin(0) < _RANGE).all()):
        return _SoftmaxOfTables.apply(table, v[0], places)[:, None]
    scores = _rows_of(table, places).transpose(1, 2)[:, :, None]
    pattern = attn.score.pattern(scores, None)
    return _Weighted.apply(pattern[:, :, 0], v[0], places)[:, None]


def _rows_of(table: Table, places: Places) -> Float[Tensor, "batch pos *rest"]:
    """The rows of a table."""
    if table.is_cuda:
        return table[places]
    return table.index_select(0, places.flatten()).unflatten(0, places.shape)  # its gradient needs no sorted places


def _add_rows(total: Table, places: Int[Tensor, "batch"], rows: Float[Tensor, "batch *rest"]) -> None:
    """Add rows to those of a table, in an order that is the same in every run."""
    if total.is_cuda:
        total.index_put_((places,), rows, accumulate=True)
    else:
        total.index_add_(0, places, rows)


class _SoftmaxOfTables(torch.autograd.Function):
    """Means of a table's rows, weighted by the softmax of scores that are a table, too.

    exp(score) and exp(score) times the row are computed once for each row of the tables; a prompt adds up those of its
    places and divides. All prompts end at the same place.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Float[Tensor, "distinct head"], table: Float[Tensor, "distinct head d"], places: Places
    ) -> Float[Tensor, "batch head d"]:
        weights = (scores - scores.amax(0)).exp_()
        weighted, last = weights[..., None] * table, places[0, -1]
        total, divisor = weighted[last].repeat(len(places), 1, 1), weights[last].repeat(len(places), 1)
        for i in range(places.shape[1] - 1):
            total += weighted.index_select(0, places[:, i])
            divisor += weights.index_select(0, places[:, i])
        inverse = divisor.reciprocal_()
        means = total.mul_(inverse[..., None])
        ctx.save_for_backward(weights, table, places, means, inverse)
        return means

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "batch head d"]
    ) -> tuple[Float[Tensor, "distinct head"], Float[Tensor, "distinct head d"], None]:
        weights, table, places, means, inverse = ctx.saved_tensors
        of_total = grad * inverse[..., None]
        of_divisor = (means * of_total).sum(-1).neg_()
        of_weighted, of_weights, last = torch.zeros_like(table), torch.zeros_like(weights), places[0, -1]
        of_weighted[last], of_weights[last] = of_total.sum(0), of_divisor.sum(0)
        for i in range(places.shape[1] - 1):
            _add_rows(of_weighted, places[:, i], of_total)
            _add_rows(of_weights, places[:, i], of_divisor)
        of_weights += (of_weighted * table).sum(-1)
        return of_weights * weights, of_weighted * weights[..., None], None


class _Weighted(torch.autograd.Function):
    """Weighted sums of a table's rows. Autograd would sort the places of all rows to add up the table's gradient."""

    @staticmethod
    def forward(
        ctx: Any, weights: Float[Tensor, "batch head pos"], table: Float[Tensor, "distinct head d"], places: Places
    ) -> Float[Tensor, "batch head d"]:
        ctx.save_for_backward(weights, table, places)
        terms = (table[places[:, i]].mul_(weights[:, :, i, None]) for i in range(places.shape[1]))
        total = next(terms)
        for term in terms:
            total += term
        return total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "batch head d"]
    ) -> tuple[Float[Tensor, "batch head pos"], Float[Tensor, "distinct head d"], None]:
        weights, table, places = ctx.saved_tensors
        of_weights, of_table = torch.empty_like(weights), torch.zeros_like(table)
        for i in range(places.shape[1]):
            of_weights[:, :, i] = (table[places[:, i]] * grad).sum(-1)
            _add_rows(of_table, places[:, i], grad * weights[:, :, i, None])
        return of_weights, of_table, None
