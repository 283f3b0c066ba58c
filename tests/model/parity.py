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


WEIGHTS = {
    "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"),
    "mlp": ("W_in", "W_gate", "W_out", "b_in", "b_out"),
}


def transformer_lens_model(name: str):
    """hooklens's model whose weights, in TransformerLens's shapes, are what the formula says."""
    from hooklens.model.config import Biases  # here, for TransformerLens records where hooklens may be missing
    from hooklens.testing import tiny_model

    model = tiny_model(**SIZES | {"biases": Biases(unembed=True)} | CONFIGS[name])
    with torch.no_grad():
        model.W_E.copy_(fill("embed.W_E", model.W_E.shape))
        if model.pos_embed is not None:
            model.W_pos.copy_(fill("pos_embed.W_pos", model.W_pos.shape))
        for layer, block in enumerate(model.blocks):
            for part, weights in WEIGHTS.items():
                for weight in weights:
                    view = getattr(getattr(block, part), weight, None)
                    if view is not None:
                        view.copy_(fill(f"blocks.{layer}.{part}.{weight}", view.shape))
            if model.cfg.gated_mlp:
                block.mlp.b_in.zero_()  # as recorded: TransformerLens adds it after the product
            for norm in ("ln1", "ln2"):
                fill_norm(getattr(block, norm, None), f"blocks.{layer}.{norm}")
        fill_norm(model.ln_final, "ln_final")
        model.W_U.copy_(fill("unembed.W_U", model.W_U.shape))
        if model.b_U is not None:
            model.b_U.copy_(fill("unembed.b_U", model.b_U.shape))
    return model


def fill_norm(norm, name: str) -> None:
    for ours, theirs in (("weight", "w"), ("bias", "b")):
        p = getattr(norm, ours, None)
        if p is not None:
            p.copy_(fill(f"{name}.{theirs}", p.shape))
