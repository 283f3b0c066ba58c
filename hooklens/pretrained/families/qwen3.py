"""Qwen 3: a Llama with an RMSNorm on the query and key of every head, and no biases."""

from dataclasses import replace

from hooklens.model.config import HookedTransformerConfig
from hooklens.pretrained.families import llama, qwen2
from hooklens.pretrained.hf_config import HFConfig


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Qwen 3 config.json."""
    cfg = llama.decoder(hf.with_defaults({"max_position_embeddings": 32768, "head_dim": 128}))
    return cfg.replace(mask=qwen2.masks(hf, cfg.n_layers), qk_norm=cfg.normalization_type)


FAMILY = replace(
    llama.FAMILY,
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    config=config,
    inside=llama.FAMILY.inside | {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"},
)
