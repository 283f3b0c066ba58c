"""Llama 1 to 3, SmolLM2, Mistral: pre-norm RMSNorm, rotary positions, gated MLP, grouped keys and values."""

from hooklens.model.config import Biases, HookedTransformerConfig, RMSNormPart, Rotary
from hooklens.pretrained.hf_config import HFConfig
from hooklens.pretrained.weight_map import Family

_MISTRAL = {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8}


def decoder(
    hf: HFConfig, positions: Rotary | tuple[Rotary, ...] | None = None, *, norm_offset: float = 0.0
) -> HookedTransformerConfig:
    """Convert the settings that all Llama-like families share; each family replaces the fields that differ."""
    attention_bias = hf.flag("attention_bias", False)
    return HookedTransformerConfig(
        n_layers=hf.layers("num_hidden_layers"),
        d_model=hf.size("hidden_size"),
        n_ctx=hf.size("max_position_embeddings"),
        n_heads=hf.size("num_attention_heads"),
        n_key_value_heads=hf.size("num_key_value_heads", hf.size("num_attention_heads")),
        d_head=hf.d_head,
        d_mlp=hf.size("intermediate_size"),
        d_vocab=hf.size("vocab_size"),
        act_fn=hf.activation("hidden_act"),
        gated_mlp=True,
        normalization_type=RMSNormPart(hf.number("rms_norm_eps", 1e-6), weight_offset=norm_offset),
        positional_embedding_type=hf.rotary(hf.d_head) if positions is None else positions,
        biases=Biases(qkv=attention_bias, o=attention_bias, mlp=hf.flag("mlp_bias", False)),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
    )


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Llama or Mistral config.json."""
    if hf.get("model_type") != "mistral":
        return decoder(hf.with_defaults({"max_position_embeddings": 2048}))
    window = hf.values.get("sliding_window", 4096)  # null: no window
    return decoder(hf.with_defaults(_MISTRAL)).replace(mask=hf.masks(window))


FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral"),
    architectures=("LlamaForCausalLM", "LlamaModel", "MistralForCausalLM", "MistralModel"),
    config=config,
    layer="model.layers.{}.",
    outside={"embed": "model.embed_tokens", "ln_final": "model.norm", "unembed.linear": "lm_head"},
    inside={
        "ln1": "input_layernorm",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj",
        "ln2": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.in_": "mlp.up_proj",
        "mlp.out": "mlp.down_proj",
    },
)
