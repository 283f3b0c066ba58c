"""Qwen 2 and 2.5: a Llama with biases on q, k and v only, and optionally a window on the later layers."""

from dataclasses import replace

from hooklens.model.config import Biases, HookedTransformerConfig, RMSNormPart
from hooklens.pretrained.families import llama
from hooklens.pretrained.hf_config import HFConfig


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Qwen 2 config.json."""
    n_heads, n_layers, width = hf.size("num_attention_heads"), hf.layers("num_hidden_layers"), hf.size("hidden_size")
    d_head = hf.size("head_dim", width // n_heads)
    windowed = hf.flag("use_sliding_window", False)
    first = hf.get("max_window_layers", 28)
    kinds = ["sliding_attention" if windowed and layer >= first else "full_attention" for layer in range(n_layers)]
    return HookedTransformerConfig(
        n_layers=n_layers,
        d_model=width,
        n_ctx=hf.size("max_position_embeddings", 32768),
        n_heads=n_heads,
        n_key_value_heads=hf.size("num_key_value_heads", n_heads),
        d_head=d_head,
        d_mlp=hf.size("intermediate_size"),
        d_vocab=hf.size("vocab_size"),
        act_fn=hf.activation("hidden_act"),
        gated_mlp=True,
        normalization_type=RMSNormPart(hf.number("rms_norm_eps", 1e-6)),
        positional_embedding_type=hf.rotary(d_head),
        mask=hf.masks(hf.size("sliding_window", 4096) if windowed else None, hf.layer_types(kinds)),
        biases=Biases(qkv=True, o=False, mlp=False),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
    )


FAMILY = replace(
    llama.FAMILY,
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    config=config,
)
