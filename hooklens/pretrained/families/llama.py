"""Llama 1 to 3, SmolLM2, Mistral: pre-norm RMSNorm, rotary positions, gated MLP, grouped keys and values."""

from hooklens.model.config import Biases, HookedTransformerConfig, RMSNormPart
from hooklens.pretrained.hf_config import HFConfig
from hooklens.pretrained.weight_map import Family


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Llama config.json."""
    n_heads, width = hf.size("num_attention_heads"), hf.size("hidden_size")
    d_head = hf.size("head_dim", width // n_heads)
    mistral = hf.get("model_type") == "mistral"
    window = hf.values.get("sliding_window", 4096) if mistral else None
    attention_bias = hf.flag("attention_bias", False)
    return HookedTransformerConfig(
        n_layers=hf.layers("num_hidden_layers"),
        d_model=width,
        n_ctx=hf.size("max_position_embeddings", 4096 * 32 if mistral else 2048),
        n_heads=n_heads,
        n_key_value_heads=hf.size("num_key_value_heads", 8 if mistral else n_heads),
        d_head=d_head,
        d_mlp=hf.size("intermediate_size"),
        d_vocab=hf.size("vocab_size"),
        act_fn=hf.activation("hidden_act"),
        gated_mlp=True,
        normalization_type=RMSNormPart(hf.number("rms_norm_eps", 1e-6)),
        positional_embedding_type=hf.rotary(d_head),
        mask=hf.masks(window),
        biases=Biases(qkv=attention_bias, o=attention_bias, mlp=hf.flag("mlp_bias", False)),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
    )


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
