"""Three tiny models that hooklens and TransformerLens 3.9.0 can both build, with weights that a formula gives.

`benchmarks/record_transformer_lens.py` runs them there and writes `recorded_transformer_lens.py`.
"""

import math
import zlib

import torch
from torch import Tensor

SIZES = {"n_layers": 2, "d_model": 8, "n_ctx": 16, "d_vocab": 11}
#: Fields that both configurations name alike.
CONFIGS = {
    "learned": {"n_heads": 2, "d_head": 4, "d_mlp": 16, "act_fn": "gelu_new", "normalization_type": "LN"},
    "rotary": {
        "n_heads": 4,
        "d_head": 4,
        "n_key_value_heads": 2,
        "d_mlp": 12,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
    },
    "attn_only": {"n_heads": 2, "d_head": 6, "attn_only": True, "normalization_type": "LN"},
}
TOKENS = torch.tensor([[1, 5, 2, 7, 3, 0], [4, 4, 9, 10, 8, 6]])


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values of the weight of that TransformerLens name: sines, so that no generator has to agree."""
    n = math.prod(shape)
    values = torch.sin((torch.arange(n, dtype=torch.float64) + 1) ** 1.5 + zlib.crc32(name.encode()) % 1000)
    return (0.6 * values).view(shape).float() + (1.0 if name.endswith(".w") else 0.0)


def summary(act: Tensor) -> tuple[float, ...]:
    """Mean and deviation of an activation, and three of its entries; masked scores left out."""
    flat = act.detach().double().flatten()
    flat = flat[flat.isfinite()]
    picks = [7919 * k % len(flat) for k in range(1, 4)]
    return tuple(round(float(x), 6) for x in (flat.mean(), flat.std(correction=0), *flat[picks]))
