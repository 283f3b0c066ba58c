"""The queries and keys whose products are a head's attention scores."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.model.transformer import HookedTransformer

Vectors = Float[Tensor, "batch head pos d_head"]


def in_dtype_of(
    model: HookedTransformer, inputs: Shaped[Tensor, "batch pos *d_in"]
) -> Shaped[Tensor, "batch pos *d_in"]:
    """Vectors in the model's dtype; tokens as they are.

    >>> from hooklens.testing import tiny_model
    >>> in_dtype_of(tiny_model().double(), torch.ones(1, 2, 3)).dtype
    torch.float64
    """
    return inputs.to(model.dtype) if inputs.is_floating_point() else inputs


def read_scored_vectors(
    model: HookedTransformer, inputs: Shaped[Tensor, "batch pos *d_in"], layers: Sequence[int]
) -> list[tuple[Vectors, Vectors]]:
    """Queries and keys of some layers as the scores read them: after norm and rotation, keys repeated for their group.

    Their products over `scale` equal `attn_scores` where the mask lets a query see a key.

    >>> from hooklens.testing import tiny_model
    >>> [(q, k)] = read_scored_vectors(tiny_model(), torch.tensor([[1, 2, 3]]), [0])
    >>> q.shape
    torch.Size([1, 2, 3, 4])
    """
    names = {layer: ["rot_q", "rot_k"] if model.cfg.rotary_at(layer) is not None else ["q", "k"] for layer in layers}
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names=[(name, layer) for layer in layers for name in names[layer]])
        vectors = []
        for layer in layers:
            attn: Any = model.blocks[layer].attn
            q, k = (cache[name, layer] for name in names[layer])
            if attn.q_norm is not None and attn.rotary is None:  # these points are before the norm
                q, k = attn.q_norm.fused(q), attn.k_norm.fused(k)
            k = k.repeat_interleave(attn.n_heads // attn.n_kv_heads, 2)
            vectors.append((q.transpose(1, 2), k.transpose(1, 2)))
    return vectors
