"""Writers and readers of the residual stream: the directions that each uses, and how strongly."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.component import Component, head_name
from hooklens.model.config import LayerNormPart
from hooklens.model.factored import FactoredMatrix
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.weights.matrices import folded_heads, folded_neurons, heads_of, need_sum
from hooklens.plugins.weights.spectrum import numerical_rank


class Part(NamedTuple):
    """A writer or reader: its place, its directions in the stream, and their singular values."""

    name: str
    layer: int
    mlp: bool
    basis: Float[Tensor, "rank d_model"]
    singular: Float[Tensor, "rank"]

    @property
    def weight(self) -> Float[Tensor, "rank"]:
        """Squared singular values as shares of their sum."""
        return self.singular.square() / self.singular.square().sum()


def writers(model: HookedTransformer, mlps: bool) -> Iterator[Part]:
    """Every head's W_V W_O and every MLP's W_out, layer by layer."""
    need_sum(model)
    for layer in range(model.cfg.n_layers):
        heads = folded_heads(model, layer)
        _, S, V = FactoredMatrix(heads.V, _centred(model, heads.O)).svd()
        for head in range(model.cfg.n_heads):
            yield _part(head_name(layer, head), layer, False, V[head].mT, S[head])
        if mlps and not model.cfg.attn_only:
            rows = _centred(model, folded_neurons(model, layer).writes)
            _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
            yield _part(Component("mlp", layer).name, layer, True, Vh, S)


def readers(model: HookedTransformer, mlps: bool) -> Iterator[Part]:
    """What every head's q, k and v and every MLP read with, layer by layer, the norm's weight folded in."""
    need_sum(model)
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    for layer, block in enumerate(model.blocks):
        heads = heads_of(model, layer)
        for which, matrices in (("q", heads.Q), ("k", heads.K[::group]), ("v", heads.V[::group])):
            U, S, _ = torch.linalg.svd(block.reads_through("attn").folded(matrices), full_matrices=False)
            for head in range(len(matrices)):
                name = Component(which, layer, head, keyed=which != "q" and group > 1).name
                yield _part(name, layer, False, U[head].mT, S[head])
        if mlps and not model.cfg.attn_only:
            neurons = folded_neurons(model, layer)
            both = neurons.reads if neurons.gate is None else torch.cat([neurons.reads, neurons.gate], dim=1)
            U, S, _ = torch.linalg.svd(both, full_matrices=False)
            yield _part(Component("mlp", layer).name, layer, True, U.mT, S)


def _part(
    name: str, layer: int, mlp: bool, basis: Float[Tensor, "rank d_model"], singular: Float[Tensor, "rank"]
) -> Part:
    """The directions with singular values above rounding error."""
    kept = int(numerical_rank(singular, (basis.shape[1], basis.shape[1]), torch.finfo(singular.dtype).eps))
    return Part(name, layer, mlp, basis[:kept].cpu(), singular[:kept].cpu())


def _centred(model: HookedTransformer, rows: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_model"]:
    """Subtract the mean if the readers are behind a LayerNorm, which ignores it."""
    return rows - rows.mean(-1, keepdim=True) if _centres(model) else rows


def _centres(model: HookedTransformer) -> bool:
    return isinstance(model.cfg.normalization_type, LayerNormPart)


def stream_width(model: HookedTransformer) -> int:
    """The number of dimensions of the stream that readers can see."""
    return model.cfg.d_model - _centres(model)


def random_block(
    rows: int, columns: int, width: int, generator: torch.Generator, like: Tensor
) -> Float[Tensor, "rows columns"]:
    """The corner of a random orthogonal matrix, up to the signs of rows or columns, which have no effect here."""
    few, many = sorted((rows, columns))
    drawn = torch.randn(width, few, generator=generator, dtype=torch.float64).to(like.dtype)
    block = torch.linalg.qr(drawn).Q[:many]
    return block if columns == few else block.mT
