"""The queries and keys whose products are a head's attention scores."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.core.errors import WrongType
from hooklens.model.config import VectorEmbed
from hooklens.model.ids import as_ids
from hooklens.model.transformer import HookedTransformer

Inputs = Shaped[Tensor, "batch pos *d_in"] | Sequence[Any]  # token ids or vectors
Vectors = Float[Tensor, "batch head pos d_head"]


def read_inputs(model: HookedTransformer, inputs: Inputs) -> Shaped[Tensor, "..."]:
    """What the model reads as a tensor: token ids, or vectors in its dtype.

    >>> from hooklens.testing import tiny_model
    >>> read_inputs(tiny_model(), [[1, 2, 3]]).shape
    torch.Size([1, 3])
    """
    if callable(inputs):
        raise WrongType(f"tokens are numbers, got {inputs!r:.60}; a method is called with (): prompts.tokens()")
    if not isinstance(model.cfg.embed, VectorEmbed):
        return as_ids(inputs, device=model.device)
    try:
        return torch.as_tensor(inputs, dtype=model.dtype, device=model.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(f"tokens are vectors [batch pos d_in], got {inputs!r:.60}") from error


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
