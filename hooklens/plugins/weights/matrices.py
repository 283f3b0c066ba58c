"""A model's matrices as they act on the stream: wrapped layers are multiplied out, norms are folded into the reader."""

from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.component import Component
from hooklens.core.errors import InputError
from hooklens.core.precision import widened
from hooklens.model.config import TokenEmbed
from hooklens.model.embed import TokenEmbedding, VectorEmbedding
from hooklens.model.factored import FactoredMatrix
from hooklens.model.linear import matrix_of
from hooklens.model.norms import Passage
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.sweeps.naive import not_finite
from hooklens.sweeps.nodes import of_kinds, read_components, read_heads

Asked = int | str | tuple | Component  # a layer's number, or a component as `read_components` reads it


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


def heads_of(model: HookedTransformer, layer: int) -> Heads:
    """W_Q, W_K, W_V and W_O of a layer as stored, one of each per head.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> heads_of(model, 1).OV.shape, torch.equal(heads_of(model, 1).Q, model.blocks[1].attn.W_Q)
    (torch.Size([2, 8, 8]), True)
    """
    attn = model.blocks[layer].attn
    q, k, v = (_per_head(matrix_of(linear, model.cfg.d_model), attn.d_head) for linear in (attn.q, attn.k, attn.v))
    k, v = (matrix.repeat_interleave(attn.n_heads // attn.n_kv_heads, 0) for matrix in (k, v))
    return Heads(q, k, v, wide(attn.output_matrix()))


def folded_heads(model: HookedTransformer, layer: int) -> Heads:
    """The same for the raw stream: the norm's weight (and a LayerNorm's centring) moved into what reads it.

    The scales of norms are left out: x @ QK @ y is a score, and x @ OV an output, up to a positive factor per position.
    The weights of q/k norms and of a norm after the branch are folded in too.
    """
    need_sum(model)
    block, raw = model.blocks[layer], heads_of(model, layer)
    Q, K, V = (block.reads_through("attn").folded(matrix) for matrix in (raw.Q, raw.K, raw.V))
    Q, K = Passage(block.attn.q_norm).unscaled(Q), Passage(block.attn.k_norm).unscaled(K)
    return Heads(Q, K, V, block.writes_through("attn").unscaled(raw.O))


class Neurons(NamedTuple):
    """The read and write matrices of a layer's neurons for the raw stream; `gate` if the MLP is gated."""

    reads: Float[Tensor, "d_model d_mlp"]
    gate: Float[Tensor, "d_model d_mlp"] | None
    writes: Float[Tensor, "d_mlp d_model"]


def folded_neurons(model: HookedTransformer, layer: int) -> Neurons:
    """W_in, W_gate and W_out of a layer, with the norm's weight moved into the first two."""
    need_sum(model)
    block = model.blocks[layer]
    if block.mlp is None:
        raise InputError("a model without MLPs (attn_only) has no neurons; read its heads")

    def folded(linear: nn.Module) -> Float[Tensor, "d_model d_mlp"]:
        return block.reads_through("mlp").folded(wide(matrix_of(linear, model.cfg.d_model)).mT)

    gate = getattr(block.mlp, "gate", None)
    writes = block.writes_through("mlp").unscaled(wide(block.mlp.output_matrix()))
    return Neurons(folded(block.mlp.in_), None if gate is None else folded(gate), writes)


def embedding_rows(model: HookedTransformer, passage: Passage) -> Float[Tensor, "d_vocab d_model"]:
    """Each token's embedding, centred and scaled as the norm does; the norm's weight is in what reads it."""
    if not isinstance(model.cfg.embed, TokenEmbed):
        raise InputError("tokens were asked for, and this model reads vectors; its spectra need no tokens")
    return passage.normalised(_embedded(model))


def embedding_matrix(model: HookedTransformer) -> Float[Tensor, "rows columns"]:
    """W_E as stored, also if the embedding is wrapped."""
    plain = type(model.embed) in (TokenEmbedding, VectorEmbedding)
    return wide(model.W_E) if plain else _embedded(model) / model.cfg.embed.scale


def _embedded(model: HookedTransformer) -> Float[Tensor, "d_vocab d_model"]:
    with torch.no_grad():
        return wide(model.embed(torch.arange(model.cfg.d_vocab, device=model.device)[None])[0])


def unembedding_rows(model: HookedTransformer) -> Float[Tensor, "d_vocab d_model"]:
    """Each token's column of W_U with the final norm's weight and centring folded in, without its scale."""
    rows = wide(matrix_of(model.unembed.linear, model.cfg.d_model))
    return Passage(model.ln_final).folded(rows.mT).mT


def need_sum(model: HookedTransformer) -> None:
    """Refuse a model in which no norm can be moved into what reads the stream."""
    need_hooked(model, "reading weights")
    model.blocks[0].need_sum("reading weights against the stream", "measure_spectrum(model) works there")


def read_head(model: HookedTransformer, layer: Asked, head: int | None = None) -> tuple[int, int]:
    """(layer, head) of one head, given by two numbers or by its name alone.

    >>> from hooklens.testing import tiny_model
    >>> read_head(tiny_model(), "L1H0"), read_head(tiny_model(), -1, 0)
    ((1, 0), (1, 0))
    """
    need_hooked(model, "reading weights")
    asked = layer if head is None else (layer, head)
    place, *others = read_heads(model, [asked])
    if others:
        raise InputError(f"the weights of one head are read, and {asked!r:.80} names {1 + len(others)}")
    return place


def read_mlp(model: HookedTransformer, layer: Asked) -> int:
    """The layer of one MLP, given by its number or name."""
    need_hooked(model, "reading weights")
    asked = ("mlp", layer) if isinstance(layer, Integral) and not isinstance(layer, bool) else layer
    (mlp,) = of_kinds(read_components(model, asked, "layer of neurons"), "layer of neurons")
    return mlp.layer


def wide(weight: Tensor) -> Tensor:
    """Detached, in float32 or the weight's own dtype, whichever is wider; refused if a number is not finite."""
    if (seen := not_finite(weight)) is not None:  # decompositions would fail, or end the process
        raise InputError(f"a weight of this model is {seen}; use a checkpoint from before training diverged")
    return widened(weight.detach())


def _per_head(matrix: Float[Tensor, "width d_model"], d_head: int) -> Float[Tensor, "any_head d_model d_head"]:
    return wide(matrix).unflatten(0, (-1, d_head)).mT
