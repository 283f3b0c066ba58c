"""Tiny GGUF files, written the way llama.cpp's converter writes them: the forward direction of what gguf_to_hf undoes.

Written from the converter's description, not by inverting our own code, so that a round trip is a test.
"""

from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SHAPE = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = SHAPE | {
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": GROUPED | {"model_type": "llama", "rope_theta": 50000.0},
    "qwen2": GROUPED | {"model_type": "qwen2", "rope_theta": 50000.0},
    "qwen3": GROUPED | {"model_type": "qwen3", "head_dim": 16},
    "gemma2": GROUPED
    | {
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "tie_word_embeddings": True,
    },
    "gemma3": GROUPED
    | {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
    | {"tie_word_embeddings": True, "num_hidden_layers": 7},
    "phi3": GROUPED | {"model_type": "phi3", "pad_token_id": 0},
    "gpt2": {"model_type": "gpt2", "vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gptneox": SHAPE | {"model_type": "gpt_neox", "rotary_pct": 0.5, "max_position_embeddings": 64},
}
NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "embed_in": "token_embd", "embed_out": "output", "final_layer_norm": "output_norm",
    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output", "dense_h_to_4h": "ffn_up",
    "dense_4h_to_h": "ffn_down",
}  # fmt: skip
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def hf_model(arch: str, **changes) -> PreTrainedModel:
    """A random transformers model of the family that `arch` names, with every weight away from its initial value.

    Without changes all tests share it: read it only.
    """
    return _random_model(arch, **changes) if changes else _shared_model(arch)


@cache
def _shared_model(arch: str) -> PreTrainedModel:
    return _random_model(arch)


def _random_model(arch: str, **changes) -> PreTrainedModel:
    config = dict(CONFIGS[arch] | changes)
    config = AutoConfig.for_model(config.pop("model_type"), attn_implementation="eager", **config)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def gguf_name(arch: str, hf: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    path, _, suffix = hf.rpartition(".")
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    table = NAMES | (GEMMA if arch.startswith("gemma") else {"post_attention_layernorm": "ffn_norm"})
    found = next(table[key] for key in sorted(table, key=len, reverse=True) if path.endswith(key))
    return f"blk.{numbers[0]}.{found}.{suffix}" if numbers else f"{found}.{suffix}"


def forward(arch: str, name: str, weight: torch.Tensor, config) -> torch.Tensor:
    """What the converter does to one tensor."""
    if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return rows.swapaxes(1, 2).reshape(weight.shape)
    if arch.startswith("gemma") and "norm.weight" in name:
        return weight + 1
    if arch == "gpt2" and name.startswith("blk.") and weight.ndim == 2:
        return weight.T
    if arch == "gptneox" and ".attn_qkv." in name:
        heads = weight.reshape(config.num_attention_heads, 3, -1, *weight.shape[1:])
        return torch.cat([heads[:, i].reshape(-1, *weight.shape[1:]) for i in range(3)])
    return weight


def add_metadata(writer: gguf.GGUFWriter, arch: str, config) -> None:
    """The keys that the converter writes for this family."""
    get = lambda *names: next(getattr(config, n) for n in names if getattr(config, n, None) is not None)  # noqa: E731
    writer.add_block_count(get("num_hidden_layers"))
    writer.add_context_length(get("max_position_embeddings"))
    writer.add_embedding_length(get("hidden_size"))
    writer.add_head_count(get("num_attention_heads"))
    writer.add_feed_forward_length(4 * config.n_embd if arch == "gpt2" else config.intermediate_size)
    if arch in ("gpt2", "gptneox"):
        writer.add_layer_norm_eps(get("layer_norm_epsilon", "layer_norm_eps"))
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        parameters = config.rope_parameters
        writer.add_rope_freq_base(parameters.get("full_attention", parameters)["rope_theta"])
    if "head_dim" in CONFIGS[arch]:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch == "gptneox":
        writer.add_rope_dimension_count(int(0.5 * config.hidden_size // config.num_attention_heads))
        writer.add_parallel_residual(True)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything and close."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, arch: str, model: PreTrainedModel, kind: str = "F32", skip=(), extra=None) -> Path:
    """Convert a transformers model to a GGUF file; matrices whose rows allow it are stored as `kind`."""
    writer = gguf.GGUFWriter(path, arch)
    add_metadata(writer, arch, model.config)
    # transformers' own reader looks for a vocabulary to know its size
    writer.add_token_list([f"t{i}" for i in range(model.config.vocab_size)])
    tied = model.config.tie_word_embeddings
    tensors = {
        gguf_name(arch, n): (n, w) for n, w in model.state_dict().items() if not (tied and n == "lm_head.weight")
    }
    for name, (_, weight) in tensors.items():
        if name not in skip:
            add_tensor(writer, name, forward(arch, name, weight, model.config), kind)
    for name, weight in (extra or {}).items():
        add_tensor(writer, name, weight, "F32")
    finish(writer)
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, kind: str) -> None:
    """Add one tensor, quantised if it is a matrix."""
    array = np.ascontiguousarray(weight.detach().float().numpy())
    if kind == "F32" or array.ndim == 1:
        writer.add_tensor(name, array)
        return
    code = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(array, code), raw_dtype=code)
