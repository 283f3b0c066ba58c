"""Qwen 3: a Llama with an RMSNorm on the query and key of every head, and no biases."""

from dataclasses import replace

from hooklens.model.config import Biases, HookedTransformerConfig, RMSNormPart
from hooklens.pretrained.families import llama
from hooklens.pretrained.hf_config import HFConfig


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Qwen 3 config.json."""
    n_layers, n_heads = hf.layers("num_hidden_layers"), hf.size("num_attention_heads")
    d_head, norm = hf.size("head_dim", 128), RMSNormPart(hf.number("rms_norm_eps", 1e-6))
    windowed = hf.flag("use_sliding_window", False)
    first = hf.get("max_window_layers", 28)
    kinds = ["sliding_attention" if windowed and layer >= first else "full_attention" for layer in range(n_layers)]
    attention_bias = hf.flag("attention_bias", False)
    return HookedTransformerConfig(
        n_layers=n_layers,
        d_model=hf.size("hidden_size"),
        n_ctx=hf.size("max_position_embeddings", 32768),
        n_heads=n_heads,
        n_key_value_heads=hf.size("num_key_value_heads", n_heads),
        d_head=d_head,
        d_mlp=hf.size("intermediate_size"),
        d_vocab=hf.size("vocab_size"),
        act_fn=hf.activation("hidden_act"),
        gated_mlp=True,
        normalization_type=norm,
        qk_norm=norm,
        positional_embedding_type=hf.rotary(d_head),
        mask=hf.masks(hf.size("sliding_window", 4096) if windowed else None, hf.layer_types(kinds)),
        biases=Biases(qkv=attention_bias, o=attention_bias, mlp=False),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
    )


FAMILY = replace(
    llama.FAMILY,
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    config=config,
    inside=llama.FAMILY.inside | {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"},
)
