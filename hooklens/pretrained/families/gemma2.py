"""Gemma 2: sandwich norms whose weights are offsets from 1, soft caps, a window on every other layer."""

import math
from dataclasses import replace

from hooklens.model.config import Biases, HookedTransformerConfig, RMSNormPart, Softmax, TokenEmbed
from hooklens.pretrained.families import llama
from hooklens.pretrained.hf_config import HFConfig


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Gemma 2 config.json."""
    hf.refuse("use_bidirectional_attention", allowed=False, why="a causal model does not attend to later tokens")
    n_layers, width, d_head = hf.layers("num_hidden_layers"), hf.size("hidden_size"), hf.size("head_dim", 256)
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(n_layers)]
    attention_bias = hf.flag("attention_bias", False)
    return HookedTransformerConfig(
        n_layers=n_layers,
        d_model=width,
        n_ctx=hf.size("max_position_embeddings", 8192),
        n_heads=hf.size("num_attention_heads"),
        n_key_value_heads=hf.size("num_key_value_heads", 4),
        d_head=d_head,
        d_mlp=hf.size("intermediate_size"),
        d_vocab=hf.size("vocab_size"),
        act_fn=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        gated_mlp=True,
        block="sandwich",
        normalization_type=RMSNormPart(hf.number("rms_norm_eps", 1e-6), weight_offset=1.0),
        positional_embedding_type=hf.rotary(d_head),
        mask=hf.masks(hf.size("sliding_window", 4096), hf.layer_types(kinds)),
        embed=TokenEmbed(scale=math.sqrt(width)),
        score_fn=Softmax(
            scale=math.sqrt(hf.number("query_pre_attn_scalar", 256.0)),
            soft_cap=hf.values.get("attn_logit_softcapping", 50.0),
        ),
        output_logits_soft_cap=hf.values.get("final_logit_softcapping", 30.0),
        biases=Biases(qkv=attention_bias, o=attention_bias, mlp=False),
        tie_word_embeddings=hf.flag("tie_word_embeddings", True),
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
