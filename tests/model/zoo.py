"""Small models of every kind that the parts can make, their weights all drawn so that nothing is 0 or 1 by chance."""

import torch

from hooklens.model.config import (
    Biases,
    DividedScaling,
    LayerNormPart,
    LinearScore,
    Llama3Scaling,
    RMSNormPart,
    Rotary,
    SlidingWindow,
    Softmax,
    TokenEmbed,
    VectorEmbed,
)
from hooklens.model.transformer import HookedTransformer
from hooklens.testing import tiny_model

RMS = RMSNormPart(eps=1e-6)
NO_BIAS = Biases(qkv=False, o=False, mlp=False)
GQA = {"n_heads": 4, "n_key_value_heads": 2, "d_head": 4}

ZOO = {
    "gpt2": {},
    "gpt2_bias_everywhere": {"biases": Biases(unembed=True), "tie_word_embeddings": True},
    "attn_only": {"attn_only": True},
    "no_norm": {"normalization_type": None, "act_fn": "relu"},
    "llama": dict(
        normalization_type=RMS, positional_embedding_type="rotary", gated_mlp=True, act_fn="silu", biases=NO_BIAS, **GQA
    ),
    "llama3": dict(
        normalization_type="RMS", positional_embedding_type=Rotary(scaling=Llama3Scaling(original_n_ctx=8)), **GQA
    ),
    "phi3": dict(
        normalization_type=RMS,
        positional_embedding_type=Rotary(
            scaling=DividedScaling((1.0, 2.0), (4.0, 9.0), original_n_ctx=3, magnitude=1.2)
        ),
        gated_mlp=True,
        act_fn="silu",
        biases=NO_BIAS,
        mask=SlidingWindow(window=4),
        **GQA,
    ),
    "neox": {"block": "parallel", "positional_embedding_type": Rotary(dim=2), "act_fn": "gelu"},
    "gptj": {"block": "parallel", "positional_embedding_type": Rotary(interleaved=True)},
    "gemma2": dict(
        block="sandwich",
        normalization_type=RMSNormPart(weight_offset=1.0),
        positional_embedding_type="rotary",
        gated_mlp=True,
        score_fn=Softmax(soft_cap=2.0),
        output_logits_soft_cap=3.0,
        mask=(SlidingWindow(window=3), "causal"),
        embed=TokenEmbed(scale=8**0.5),
        tie_word_embeddings=True,
        **GQA,
    ),
    "gemma3": dict(
        block="sandwich",
        normalization_type=RMS,
        qk_norm=RMSNormPart(weight_offset=1.0),
        positional_embedding_type=(Rotary(), Rotary(base=100.0)),
        mask=(SlidingWindow(window=2), "causal"),
        **GQA,
    ),
    "qwen3": dict(normalization_type="RMS", qk_norm="RMS", positional_embedding_type="rotary", **GQA),
    "post": {"block": "post", "positional_embedding_type": "sinusoidal", "act_fn": "relu"},
    "post_attn_only": {"block": "post", "attn_only": True},
    "post_rms_gqa": dict(block="post", normalization_type="RMS", positional_embedding_type="rotary", **GQA),
    "sandwich_ln": {"block": "sandwich", "positional_embedding_type": "sinusoidal", "attn_only": True},
    "parallel_attn_only": {"block": "parallel", "attn_only": True, "positional_embedding_type": "none"},
    "linear_attention": {"score_fn": "linear", "positional_embedding_type": "none", "normalization_type": None},
    "linear_gqa": dict(score_fn=LinearScore(soft_cap=1.5), positional_embedding_type="rotary", **GQA),
    "window": {"mask": SlidingWindow(window=2), "normalization_type": LayerNormPart(affine=False)},
    "bidirectional": {"mask": "none", "d_vocab_out": 5},
    "one_layer": {"n_layers": 1, "act_fn": "gelu_quick"},
}
TOKENS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 9, 0, 10]])


def zoo_model(name: str, *, dtype: torch.dtype = torch.float32, **changes) -> HookedTransformer:
    """A model of the zoo. Every parameter gets noise, biases and norm weights too."""
    model = tiny_model(dtype=dtype, **(ZOO[name] | changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(dtype)
    return model


def vector_model(**changes) -> HookedTransformer:
    """A model that reads vectors instead of tokens."""
    return tiny_model(embed=VectorEmbed(d_in=3), d_vocab_out=1, **changes)


class LowRank(torch.nn.Module):
    """What LoRA tools put in a linear layer's place."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(2)
        n_out, n_in = base.weight.shape
        self.A = torch.nn.Parameter(torch.randn(2, n_in, generator=generator).to(base.weight))
        self.B = torch.nn.Parameter(torch.randn(n_out, 2, generator=generator).to(base.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class Peft(LowRank):
    """The kind that hands out the weight and bias of what it wraps, which are not what it computes."""

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


def wrap_layers(model: HookedTransformer, where: str, kind: type[LowRank] = LowRank) -> HookedTransformer:
    """The model with `attn.o`, `mlp.out`, ... of every block wrapped, or `unembed`."""
    parts = [model.unembed] if where == "unembed" else [getattr(block, where.split(".")[0]) for block in model.blocks]
    name = "linear" if where == "unembed" else where.split(".")[1]
    for part in parts:
        setattr(part, name, kind(getattr(part, name)))
    return model
