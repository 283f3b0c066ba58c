"""GPT-NeoX and Pythia: parallel (or sequential) attention and MLP, partial rotary, q k v stored by head."""

from hooklens.model.config import Biases, HookedTransformerConfig, LayerNormPart
from hooklens.pretrained.hf_config import HFConfig
from hooklens.pretrained.weight_map import Family, From


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a GPT-NeoX config.json."""
    width, n_heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    rope = hf.rope_settings()
    rope.setdefault("rope_theta", hf.number("rotary_emb_base", 10000.0))
    rope.setdefault("partial_rotary_factor", hf.number("rotary_pct", 0.25))
    attention_bias = hf.flag("attention_bias", True)
    return HookedTransformerConfig(
        n_layers=hf.layers("num_hidden_layers"),
        d_model=width,
        n_ctx=hf.size("max_position_embeddings", 2048),
        n_heads=n_heads,
        d_mlp=hf.size("intermediate_size"),
        d_vocab=hf.size("vocab_size"),
        act_fn=hf.activation("hidden_act", "gelu"),
        block="parallel" if hf.flag("use_parallel_residual", True) else "pre",
        normalization_type=LayerNormPart(hf.number("layer_norm_eps", 1e-5)),
        positional_embedding_type=hf.rotary(width // n_heads, rope),
        biases=Biases(qkv=attention_bias, o=attention_bias, mlp=True),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
    )


FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    config=config,
    prefix="gpt_neox.",
    layer="gpt_neox.layers.{}.",
    outside={"embed": "gpt_neox.embed_in", "ln_final": "gpt_neox.final_layer_norm", "unembed.linear": "lm_head"},
    inside={
        "ln1": "input_layernorm",
        ("attn.q", "attn.k", "attn.v"): From("attention.query_key_value", by_head=True),
        "attn.o": "attention.dense",
        "ln2": "post_attention_layernorm",
        "mlp.in_": "mlp.dense_h_to_4h",
        "mlp.out": "mlp.dense_4h_to_h",
    },
    renames=((r"^embed_out\.", "lm_head."),),  # files written before about transformers 5.20
    ignored=(r"attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$"),
)
