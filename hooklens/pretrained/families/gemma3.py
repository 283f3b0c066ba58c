"""Gemma 3, its text model: five windowed layers per full layer, each kind with its own rotary base; q/k norm."""

from dataclasses import replace
from typing import Any

from hooklens.model.config import HookedTransformerConfig, Rotary
from hooklens.pretrained.families import gemma2
from hooklens.pretrained.hf_config import HFConfig

_DEFAULTS = {
    "num_hidden_layers": 26,
    "hidden_size": 2304,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "vocab_size": 262_208,
}
_BASES = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}


def rotary(hf: HFConfig, kind: str) -> Rotary:
    """The rotary part of one kind of layer; before transformers 5, scaling applied to the full layers only."""
    nested: dict[str, Any] = hf.get("rope_parameters") or {}
    if nested and not set(nested) & set(_BASES):  # one setting for all layers
        return hf.rotary(hf.d_head, theta=_BASES[kind])
    old = {"rope_theta": hf.get("rope_local_base_freq")}
    if kind == "full_attention":
        old = {"rope_theta": hf.get("rope_theta")} | (hf.get("rope_scaling") or {})
    return hf.rotary(hf.d_head, nested.get(kind) or old, theta=_BASES[kind])


def config(outer: HFConfig) -> HookedTransformerConfig:
    """Convert a Gemma 3 config.json; of a model with images, the text part."""
    tied = outer.flag("tie_word_embeddings", True)
    inner = HFConfig(outer.get("text_config") or outer.values, outer.where, most_layers=outer.most_layers)
    hf = inner.with_defaults(_DEFAULTS | {"tie_word_embeddings": tied})
    hf.refuse("attn_logit_softcapping", allowed=None, why="transformers ignores it, so its meaning is unclear")
    every, n_layers = hf.size("sliding_window_pattern", 6), hf.layers("num_hidden_layers")
    kinds = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(n_layers)]
    positions = tuple(rotary(hf, kind) for kind in hf.layer_types(kinds))
    cfg = gemma2.gemma(hf, positions, kinds)
    return cfg.replace(qk_norm=cfg.normalization_type, output_logits_soft_cap=hf.get("final_logit_softcapping"))


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
