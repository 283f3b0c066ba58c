"""GPT-2: learned positions, LayerNorm, fused q k v, matrices stored as (in, out)."""

from hooklens.model.config import Biases, HookedTransformerConfig, LayerNormPart, Softmax
from hooklens.pretrained.hf_config import HFConfig
from hooklens.pretrained.weight_map import Family, From


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a GPT-2 config.json."""
    hf.refuse("scale_attn_by_inverse_layer_idx", allowed=False, why="scores scaled by layer are not supported")
    hf.refuse("add_cross_attention", allowed=False, why="cross-attention is not supported")
    width, n_heads = hf.size("n_embd", 768), hf.size("n_head", 12)
    scaled = hf.flag("scale_attn_weights", True)
    return HookedTransformerConfig(
        n_layers=hf.layers("n_layer", 12),
        d_model=width,
        n_ctx=hf.size("n_positions", 1024),
        n_heads=n_heads,
        d_mlp=hf.size("n_inner", 4 * width),
        d_vocab=hf.size("vocab_size", 50257),
        act_fn=hf.activation("activation_function", "gelu_new"),
        normalization_type=LayerNormPart(hf.number("layer_norm_epsilon", 1e-5)),
        positional_embedding_type="learned",
        score_fn=Softmax(scale=None if scaled else 1.0),
        biases=Biases(qkv=True, o=True, mlp=True),
        tie_word_embeddings=hf.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    config=config,
    prefix="transformer.",
    layer="transformer.h.{}.",
    outside={
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "ln_final": "transformer.ln_f",
        "unembed.linear": "lm_head",
    },
    inside={
        "ln1": "ln_1",
        ("attn.q", "attn.k", "attn.v"): From("attn.c_attn", transposed=True),
        "attn.o": From("attn.c_proj", transposed=True),
        "ln2": "ln_2",
        "mlp.in_": From("mlp.c_fc", transposed=True),
        "mlp.out": From("mlp.c_proj", transposed=True),
    },
    ignored=(r"h\.\d+\.attn\.(masked_)?bias$",),  # the causal mask, which old files store
)
