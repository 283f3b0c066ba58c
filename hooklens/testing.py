"""Tiny models with known answers, and the battery that every plugin passes."""

from typing import Any

import torch

from hooklens.model.config import HookedTransformerConfig
from hooklens.model.transformer import HookedTransformer


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> HookedTransformer:
    """A random model of 2 layers, 2 heads, d_model 8 and 11 tokens; any configuration field may be changed.

    >>> tiny_model()
    HookedTransformer(tiny: 2 layers, d_model 8, 2 heads of 4, d_mlp 32, 0.0M parameters)
    """
    sizes: dict[str, Any] = dict(n_layers=2, d_model=8, n_ctx=32, n_heads=2, d_vocab=11, model_name="tiny")
    return HookedTransformer(HookedTransformerConfig(**sizes | changes), seed=seed, dtype=dtype)
