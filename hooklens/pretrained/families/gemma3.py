"""Gemma 3, its text model: five windowed layers per full layer, each kind with its own rotary base; q/k norm."""

import math
from dataclasses import replace
from typing import Any

from hooklens.model.config import Biases, HookedTransformerConfig, RMSNormPart, Rotary, Softmax, TokenEmbed
from hooklens.pretrained.families import gemma2
from hooklens.pretrained.hf_config import HFConfig

_BASES = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}


def rotary(hf: HFConfig, d_head: int, kind: str) -> Rotary:
    """The rotary part of one kind of layer; before transformers 5, scaling applied to the full layers only."""
    nested: dict[str, Any] = hf.get("rope_parameters") or {}
    if nested and not set(nested) & set(_BASES):  # one setting for all layers
        return hf.rotary(d_head, theta=_BASES[kind])
    old = {"rope_theta": hf.get("rope_local_base_freq")}
    if kind == "full_attention":
        old = {"rope_theta": hf.get("rope_theta")} | (hf.get("rope_scaling") or {})
    return hf.rotary(d_head, nested.get(kind) or old, theta=_BASES[kind])


def config(outer: HFConfig) -> HookedTransformerConfig:
    """Convert a Gemma 3 config.json; of a model with images, the text part."""
    hf = HFConfig(outer.get("text_config") or outer.values, outer.where, most_layers=outer.most_layers)
    hf.refuse("use_bidirectional_attention", allowed=False, why="a causal model does not attend to later tokens")
    hf.refuse("attn_logit_softcapping", allowed=None, why="transformers ignores it, so its meaning is unclear")
    n_layers, width, d_head = hf.layers("num_hidden_layers", 26), hf.size("hidden_size", 2304), hf.size("head_dim", 256)
    every = hf.size("sliding_window_pattern", 6)
    kinds = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(n_layers)]
    kinds = hf.layer_types(kinds)
    norm = RMSNormPart(hf.number("rms_norm_eps", 1e-6), weight_offset=1.0)
    attention_bias = hf.flag("attention_bias", False)
    return HookedTransformerConfig(
        n_layers=n_layers,
        d_model=width,
        n_ctx=hf.size("max_position_embeddings", 131_072),
        n_heads=hf.size("num_attention_heads", 8),
        n_key_value_heads=hf.size("num_key_value_heads", 4),
        d_head=d_head,
        d_mlp=hf.size("intermediate_size", 9216),
        d_vocab=hf.size("vocab_size", 262_208),
        act_fn=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        gated_mlp=True,
        block="sandwich",
        normalization_type=norm,
        qk_norm=norm,
        mask=hf.masks(hf.size("sliding_window", 4096), kinds),
        positional_embedding_type=tuple(rotary(hf, d_head, kind) for kind in kinds),
        embed=TokenEmbed(scale=math.sqrt(width)),
        score_fn=Softmax(scale=math.sqrt(hf.number("query_pre_attn_scalar", 256.0))),
        output_logits_soft_cap=hf.get("final_logit_softcapping"),
        biases=Biases(qkv=attention_bias, o=attention_bias, mlp=False),
        tie_word_embeddings=hf.flag("tie_word_embeddings", outer.flag("tie_word_embeddings", True)),
    )


FAMILY = replace(
    gemma2.FAMILY,
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3ForConditionalGeneration"),
    config=config,
    inside=gemma2.FAMILY.inside | {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"},
    renames=((r"^language_model\.(model\.|lm_head\.)", r"\1"), (r"^model\.language_model\.", "model.")),
    ignored=(r"rotary_emb\.", r"^(model\.)?vision_tower\.", r"^(model\.)?multi_modal_projector\."),
)
