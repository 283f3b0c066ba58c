"""Phi 3 and 3.5, Phi 4 mini: a Llama with fused q k v and gate/up, long rotary positions, and partial rotary."""

from dataclasses import replace

from hooklens.model.config import Biases, HookedTransformerConfig, RMSNormPart
from hooklens.pretrained.families import llama
from hooklens.pretrained.hf_config import HFConfig


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Phi 3 config.json."""
    width, n_heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    d_head = hf.size("head_dim", width // n_heads)
    rope = hf.rope_settings()
    if (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):  # the name of longrope in early files
        rope["rope_type"] = "longrope"
    rope.setdefault("original_max_position_embeddings", 4096)
    return HookedTransformerConfig(
        n_layers=hf.layers("num_hidden_layers"),
        d_model=width,
        n_ctx=hf.size("max_position_embeddings", 4096),
        n_heads=n_heads,
        n_key_value_heads=hf.size("num_key_value_heads", n_heads),
        d_head=d_head,
        d_mlp=hf.size("intermediate_size"),
        d_vocab=hf.size("vocab_size"),
        act_fn=hf.activation("hidden_act"),
        gated_mlp=True,
        normalization_type=RMSNormPart(hf.number("rms_norm_eps", 1e-5)),
        positional_embedding_type=hf.rotary(d_head, rope),
        mask=hf.masks(hf.get("sliding_window")),
        biases=Biases(qkv=False, o=False, mlp=False),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
    )


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
