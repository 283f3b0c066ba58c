"""Gemma 2: sandwich norms whose weights are offsets from 1, soft caps, a window on every other layer."""

import math
from dataclasses import replace

from hooklens.model.config import HookedTransformerConfig, Rotary, Softmax, TokenEmbed
from hooklens.pretrained.families import llama
from hooklens.pretrained.hf_config import HFConfig

_DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def gemma(hf: HFConfig, positions: Rotary | tuple[Rotary, ...], kinds: list[str]) -> HookedTransformerConfig:
    """Convert the settings that Gemma 2 and 3 share; `kinds` is the kind of attention of each layer."""
    hf.refuse("use_bidirectional_attention", allowed=False, why="a causal model does not attend to later tokens")
    cfg = llama.decoder(hf, positions, norm_offset=1.0)
    return cfg.replace(
        act_fn=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        block="sandwich",
        mask=hf.masks(hf.size("sliding_window", 4096), hf.layer_types(kinds)),
        embed=TokenEmbed(scale=math.sqrt(cfg.d_model)),
        score_fn=Softmax(scale=math.sqrt(hf.number("query_pre_attn_scalar", 256.0))),
        biases=replace(cfg.biases, mlp=False),
    )


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Gemma 2 config.json."""
    hf = hf.with_defaults(_DEFAULTS)
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(hf.layers("num_hidden_layers"))]
    cfg = gemma(hf, hf.rotary(hf.d_head), kinds)
    return cfg.replace(
        score_fn=replace(cfg.score_fn, soft_cap=hf.values.get("attn_logit_softcapping", 50.0)),  # null: no cap
        output_logits_soft_cap=hf.values.get("final_logit_softcapping", 30.0),
    )


FAMILY = replace(
    llama.FAMILY,
    name="gemma2",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    config=config,
    inside=llama.FAMILY.inside
    | {
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    },
)
