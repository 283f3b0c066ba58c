"""A model's matrices as they act on the stream: wrapped layers are multiplied out, norms are folded into the reader."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.model.config import TokenEmbed
from hooklens.model.embed import TokenEmbedding, VectorEmbedding
from hooklens.model.factored import FactoredMatrix
from hooklens.model.linear import matrix_of
from hooklens.model.norms import Norm

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Reading = Float[Tensor, "*lead d_model width"]
Writing = Float[Tensor, "*lead width d_model"]
Rows = Float[Tensor, "row d_model"]


class Heads(NamedTuple):
    """The read and write matrices of a layer's heads; keys and values of a group are repeated for its heads."""

    Q: Float[Tensor, "head d_model d_head"]
    K: Float[Tensor, "head d_model d_head"]
    V: Float[Tensor, "head d_model d_head"]
    O: Float[Tensor, "head d_head d_model"]  # noqa: E741

    @property
    def QK(self) -> FactoredMatrix:
        return FactoredMatrix(self.Q, self.K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        return FactoredMatrix(self.V, self.O)


def heads_of(model: "HookedTransformer", layer: int) -> Heads:
    """W_Q, W_K, W_V and W_O of a layer as stored, one of each per head.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> heads_of(model, 1).OV.shape, torch.equal(heads_of(model, 1).Q, model.blocks[1].attn.W_Q)
    (torch.Size([2, 8, 8]), True)
    """
    attn = model.blocks[layer].attn
    q, k, v = (_per_head(matrix_of(linear, model.cfg.d_model), attn.d_head) for linear in (attn.q, attn.k, attn.v))
    k, v = (one.repeat_interleave(attn.n_heads // attn.n_kv_heads, 0) for one in (k, v))
    return Heads(q, k, v, wide(attn.output_matrix()))


def folded_heads(model: "HookedTransformer", layer: int) -> Heads:
    """The same for the raw stream: ln1's weight (and a LayerNorm's centring) is folded into what reads it.

    The scales of norms are left out: x @ QK @ y is a score, and x @ OV an output, up to a positive factor per position.
    The weights of q/k norms and of a norm after the branch are folded in too.
    """
    refuse_post_norm(model)
    block, raw = model.blocks[layer], heads_of(model, layer)
    Q, K, V = (read_through(block.ln1, one) for one in (raw.Q, raw.K, raw.V))
    Q, K = one_scale(block.attn.q_norm, Q), one_scale(block.attn.k_norm, K)
    return Heads(Q, K, V, one_scale(block.ln1_post, raw.O))


class Neurons(NamedTuple):
    """The read and write matrices of a layer's neurons for the raw stream; `gate` if the MLP is gated."""

    reads: Float[Tensor, "d_model d_mlp"]
    gate: Float[Tensor, "d_model d_mlp"] | None
    writes: Float[Tensor, "d_mlp d_model"]


def folded_neurons(model: "HookedTransformer", layer: int) -> Neurons:
    """W_in, W_gate and W_out of a layer, with ln2's weight folded into the first two."""
    refuse_post_norm(model)
    block = model.blocks[layer]
    if block.mlp is None:
        raise InputError("a model without MLPs (attn_only) has no neurons; read its heads")
    gate = getattr(block.mlp, "gate", None)
    reads = [
        None if linear is None else read_through(block.ln2, wide(matrix_of(linear, model.cfg.d_model)).mT)
        for linear in (block.mlp.in_, gate)
    ]
    assert reads[0] is not None
    return Neurons(reads[0], reads[1], one_scale(block.ln2_post, wide(block.mlp.output_matrix())))


def read_through(norm: Norm | None, matrix: Reading) -> Reading:
    """N W, with x N the norm of x at scale 1 and without its bias: what W reads from the stream before the norm.

    N = P diag(gain) with the (symmetric) centring P, so N W centres the columns of gain * W.
    """
    if norm is None:
        return matrix
    gain = norm.gain()
    columns = matrix.mT if gain is None else matrix.mT * gain.detach().to(matrix)
    return norm.centred(columns).mT


def one_scale(norm: Norm | None, rows: Writing) -> Writing:
    """Rows after a norm with scale 1 and without its bias."""
    return rows if norm is None else norm.linearised(rows, torch.ones_like(rows[..., :1]))


def embedding_rows(model: "HookedTransformer", norm: Norm | None) -> Float[Tensor, "d_vocab d_model"]:
    """Each token's embedding, centred and scaled as the norm does; the norm's weight is folded into the reader."""
    if not isinstance(model.cfg.embed, TokenEmbed):
        raise InputError("this model reads vectors and has no token embeddings; spectrum(model) needs none")
    rows = _embedded(model)
    if norm is None:
        return rows
    centred = norm.centred(rows)
    return centred / norm.rms(centred)


def embedding_matrix(model: "HookedTransformer") -> Float[Tensor, "rows columns"]:
    """W_E as stored, also if the embedding is wrapped."""
    plain = type(model.embed) in (TokenEmbedding, VectorEmbedding)
    return wide(model.W_E) if plain else _embedded(model) / model.cfg.embed.scale


def _embedded(model: "HookedTransformer") -> Float[Tensor, "d_vocab d_model"]:
    with torch.no_grad():
        return wide(model.embed(torch.arange(model.cfg.d_vocab, device=model.device)[None])[0])


def unembedding_rows(model: "HookedTransformer") -> Float[Tensor, "d_vocab d_model"]:
    """Each token's column of W_U with the final norm's weight and centring folded in, without its scale."""
    rows = wide(matrix_of(model.unembed.linear, model.cfg.d_model))
    return read_through(model.ln_final, rows.mT).mT


def refuse_post_norm(model: "HookedTransformer") -> None:
    if getattr(model.blocks[0], "renorms_stream", False):
        raise InputError(
            "weights can be read only in a stream that components add to; this model's post-norm blocks normalise the "
            "stream itself, so nothing can be folded through a norm; spectrum(model) works there"
        )


def check_layer(model: "HookedTransformer", layer: int, head: int | None = None) -> None:
    """Refuse a layer or head that the model does not have."""
    for name, value, n in (("layer", layer, model.cfg.n_layers), ("head", head, model.cfg.n_heads)):
        if value is not None and not 0 <= value < n:
            raise InputError(f"there is no {name} {value}; this model has {name}s 0 to {n - 1}")


def wide(weight: Tensor) -> Tensor:
    """Detached, in float32 or the weight's own dtype, whichever is wider."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _per_head(matrix: Float[Tensor, "width d_model"], d_head: int) -> Float[Tensor, "any_head d_model d_head"]:
    return wide(matrix).unflatten(0, (-1, d_head)).mT
