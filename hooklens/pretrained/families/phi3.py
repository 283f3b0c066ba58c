"""Phi 3 and 3.5, Phi 4 mini: a Llama with fused q k v and gate/up, long rotary positions, and partial rotary."""

from dataclasses import replace

from hooklens.model.config import Biases, HookedTransformerConfig
from hooklens.pretrained.families import llama
from hooklens.pretrained.hf_config import HFConfig

_DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Phi 3 config.json."""
    rope = hf.rope_settings()
    if (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):  # the name of longrope in early files
        rope["rope_type"] = "longrope"
    rope.setdefault("original_max_position_embeddings", 4096)
    hf = hf.with_defaults(_DEFAULTS)
    cfg = llama.decoder(hf, hf.rotary(hf.d_head, rope))
    return cfg.replace(mask=hf.masks(hf.get("sliding_window")), biases=Biases(qkv=False, o=False, mlp=False))


FAMILY = replace(
    llama.FAMILY,
    name="phi3",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM", "Phi3Model"),
    config=config,
    inside={
        "ln1": "input_layernorm",
        ("attn.q", "attn.k", "attn.v"): "self_attn.qkv_proj",
        "attn.o": "self_attn.o_proj",
        "ln2": "post_attention_layernorm",
        ("mlp.gate", "mlp.in_"): "mlp.gate_up_proj",
        "mlp.out": "mlp.down_proj",
    },
)
