"""A tiny random model of every family, as transformers builds it and as hooklens loads it. Nothing is downloaded."""

from functools import cache
from typing import Any

import torch
from torch import nn

from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.loading import load

N_CTX, D_VOCAB = 64, 97
_SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_HEAD = _SIZES | {"head_dim": 12}  # not hidden_size / heads
_GEMMA = _HEAD | {"query_pre_attn_scalar": 9, "sliding_window": 5, "rms_norm_eps": 1e-5}
_NEOX = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 3.5],
}

#: By name: the prefix of transformers' classes, and the configuration's keywords.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": N_CTX, "vocab_size": D_VOCAB}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "llama": ("Llama", _SIZES),
    "llama3": ("Llama", _HEAD | {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", _SIZES | {"sliding_window": 5, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoX", _NEOX | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
    "gpt_neox_serial": (
        "GPTNeoX",
        _NEOX
        | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "relu"}
        | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
    ),
    "qwen2": ("Qwen2", _SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", _HEAD | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": (
        "Gemma3",
        _GEMMA
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "phi3": ("Phi3", _SIZES | {"rope_parameters": _LONG, "original_max_position_embeddings": 24, "sliding_window": 30}),
}


def hf_config(name: str) -> Any:
    """transformers' configuration of a tiny model."""
    import transformers

    prefix, keywords = FAMILIES[name]
    config_class = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    return config_class(**keywords)


def tiny_hf(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' model of that configuration, every parameter random: no norm has unit weights, no bias is zero."""
    import transformers

    prefix = FAMILIES[name][0]
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # also for buffers such as Gemma's embedding scale
    try:
        with torch.random.fork_rng(devices=[]):
            config = hf_config(name)
            config._attn_implementation = "eager"
            model = getattr(transformers, prefix + head)(config).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            centre = 1.0 if "norm" in key.lower() or "ln_" in key else 0.0
            p.copy_(0.3 * noise + (centre if key.endswith("weight") else 0.0))
    return model.to(dtype)


@cache
def _loaded(name: str, dtype: torch.dtype, seed: int) -> HookedTransformer:
    return load(tiny_hf(name, seed, dtype))


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> HookedTransformer:
    """A hooklens model of that family with the weights of `tiny_hf(name, seed)`; a copy, yours to edit."""
    import copy

    return copy.deepcopy(_loaded(name, dtype, seed))


def tiny_tokens(batch: int = 2, pos: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(3, D_VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))
