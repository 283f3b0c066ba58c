"""Undo the changes of llama.cpp's conversion to a model's names, layouts and configuration.

One `Architecture` per family: the hub names of its tensors, the tensors that were rearranged, and the conversion of its
metadata to a `config.json`.

Reference: convert_hf_to_gguf.py in the llama.cpp repository, each `undo` inverts its conversion.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import FileRefused

if TYPE_CHECKING:
    from hooklens.pretrained.gguf import GGUFFile

Undo = Callable[[str, Tensor, dict[str, Any]], Tensor]
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_FOR_POSITIONS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}  # config has them


@dataclass(frozen=True)
class Architecture:
    """How one llama.cpp architecture is represented on the hub."""

    config: Callable[["GGUFFile"], dict[str, Any]]
    top: dict[str, str]
    layer: str
    parts: dict[str, str]
    undo: Undo = lambda name, weight, config: weight


def find_architecture(file: "GGUFFile") -> Architecture:
    """The file's architecture; an unknown one raises an error that lists the supported ones."""
    name = file.architecture
    if name not in ARCHITECTURES:
        raise FileRefused(
            f"{file.path.name} contains a model of the architecture {name!r}; supported architectures: "
            f"{', '.join(ARCHITECTURES)}"
        )
    experts = file.metadata.get(f"{name}.expert_count", 0)
    if experts:
        raise FileRefused(
            f"{file.path.name} contains a mixture of {experts} experts; only dense models are supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def hf_names(file: "GGUFFile") -> dict[str, str]:
    """The hub name of each tensor in the file; a tensor without one raises an error."""
    family = find_architecture(file)
    names: dict[str, str] = {}
    unknown = []
    tied = _output_is_embedding(file)
    for name in file.tensors:
        if name in _FOR_POSITIONS or (tied and name == "output.weight"):
            continue
        block, part, suffix = _split(name)
        table = family.top if block is None else family.parts
        if part not in table:
            unknown.append(name)
            continue
        prefix = "" if block is None else family.layer.format(block) + "."
        names[name] = f"{prefix}{table[part]}.{suffix}"
    if unknown:
        shown = ", ".join(unknown[:5]) + (f", ... ({len(unknown)} in all)" if len(unknown) > 5 else "")
        raise FileRefused(
            f"{file.path.name} has tensors that a {file.architecture!r} model does not have: {shown}; it may be "
            "another architecture under this name, or contain an adapter"
        )
    return names


def _split(name: str) -> tuple[int | None, str, str]:
    """
    >>> _split("blk.3.attn_q.weight"), _split("output.weight")
    ((3, 'attn_q', 'weight'), (None, 'output', 'weight'))
    """
    if match := _BLOCK.fullmatch(name):
        return int(match[1]), match[2], match[3]
    part, _, suffix = name.rpartition(".")
    return None, part, suffix


def _output_is_embedding(file: "GGUFFile") -> bool:
    """Whether the model is tied: no output matrix, or (older conversions of GPT-2) a second copy of the embedding."""
    output, embedding = file.tensors.get("output.weight"), file.tensors.get("token_embd.weight")
    if output is None or embedding is None:
        return output is None
    if (output.shape, output.kind) != (embedding.shape, embedding.kind):
        return False
    with open(file.path, "rb") as one, open(file.path, "rb") as other:
        one.seek(output.offset)
        other.seek(embedding.offset)
        left = output.nbytes
        while left > 0:
            n = min(left, 1 << 20)
            if one.read(n) != other.read(n):
                return False
            left -= n
    return True


def _blocks(file: "GGUFFile") -> int:
    """The number of blocks. Each block has its own tensors, so a block count above the number of tensors is wrong."""
    n_blocks = file.require(f"{file.architecture}.block_count")
    if type(n_blocks) is not int or not 0 < n_blocks <= len(file.tensors):
        raise FileRefused(
            f"{file.path.name}: {file.architecture}.block_count is {n_blocks!r:.80}, and the file has "
            f"{len(file.tensors)} tensors; convert the model again"
        )
    return n_blocks


def _one(file: "GGUFFile", key: str, default: Any = None) -> Any:
    """A number that holds for every layer; some files give a list, one value a layer."""
    value = file.require(key) if default is None else file.metadata.get(key, default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise FileRefused(
                f"{file.path.name}: {key} differs between layers ({value}); one value for all layers is needed"
            )
        value = value[0]
    return value


def _eps(value: float) -> float:
    """Convert the file's float32 to the decimal number it stands for.

    >>> _eps(9.999999747378752e-06)
    1e-05
    """
    return float(f"{value:.7g}")


def _common(file: "GGUFFile", model_type: str, name: str) -> dict[str, Any]:
    """The settings of every configuration: kind, vocabulary, special tokens, tied or not."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise FileRefused(f"{file.path.name} has no tensor 'token_embd.weight': it is an adapter or part of a model")
    return {
        "model_type": model_type,
        "architectures": [name],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": _output_is_embedding(file),
        # Absent ids are None on purpose: a family's default may lie outside this vocabulary.
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _decoder(file: "GGUFFile", model_type: str, name: str) -> dict[str, Any]:
    """The configuration of a Llama-like decoder: RMSNorm, rotary positions, gated MLP."""
    arch = file.architecture
    n_heads, width = _one(file, f"{arch}.attention.head_count"), file.require(f"{arch}.embedding_length")
    return {
        **_common(file, model_type, name),
        "hidden_size": width,
        "num_hidden_layers": _blocks(file),
        "num_attention_heads": n_heads,
        "num_key_value_heads": _one(file, f"{arch}.attention.head_count_kv", n_heads),
        "head_dim": file.metadata.get(f"{arch}.attention.key_length", width // n_heads),
        "intermediate_size": _one(file, f"{arch}.feed_forward_length"),
        "max_position_embeddings": file.require(f"{arch}.context_length"),
        "rms_norm_eps": _eps(file.require(f"{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(file.metadata.get(f"{arch}.rope.freq_base", 10000.0)),
        "rope_scaling": _scaling(file),
        "hidden_act": "silu",
    }


def _scaling(file: "GGUFFile") -> dict[str, Any] | None:
    """The scaling of the rotary frequencies for long contexts, or None."""
    arch = file.architecture
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{arch}.rope.scaling.factor")
    original = file.metadata.get(f"{arch}.rope.scaling.original_context_length")
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, original or 8192)
    if kind == "none" or factor is None:
        return None
    scaling = {"rope_type": kind, "factor": float(factor)}
    return scaling if original is None else scaling | {"original_max_position_embeddings": original}


def llama3_factors(
    theta: float, d_rot: int, *, factor: float, low: float, high: float, original: int
) -> Float[Tensor, "frequency"]:
    """The divisor of each rotary frequency in Llama 3: 1 for fast ones, `factor` for slow ones, blended between.

    Reference: Llama 3.1's `apply_scaling`, written as the factors that GGUF files hold.
    """
    wavelength = 2 * math.pi * theta ** (torch.arange(0, d_rot, 2, dtype=torch.float64) / d_rot)
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - blend) / factor + blend)


def _llama3_scaling(file: "GGUFFile", original: int) -> dict[str, Any] | None:
    """The file stores only one factor per frequency; recover the settings they came from, and check them."""
    seen = file.tensor("rope_freqs.weight", torch.float64)
    theta = float(file.metadata.get(f"{file.architecture}.rope.freq_base", 10000.0))
    # The slowest frequency carries the full factor, except in models too small to have one slow enough.
    settings: dict[str, Any] = {"factor": round(seen.max().item(), 4), "low": 1.0, "high": 4.0, "original": original}
    if settings["factor"] == 1.0:
        return None
    expected = llama3_factors(theta, 2 * len(seen), **settings)
    if not torch.allclose(seen, expected, rtol=1e-4):
        raise FileRefused(
            f"{file.path.name}: rope_freqs.weight is {seen.tolist()[:4]}..., Llama 3's scaling with {settings} gives "
            f"{expected.tolist()[:4]}...; only Llama 3's scaling is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": settings["factor"],
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _llama(file: "GGUFFile") -> dict[str, Any]:
    return {
        **_decoder(file, "llama", "LlamaForCausalLM"),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _qwen2(file: "GGUFFile") -> dict[str, Any]:
    return {**_decoder(file, "qwen2", "Qwen2ForCausalLM"), "use_sliding_window": False}


def _qwen3(file: "GGUFFile") -> dict[str, Any]:
    extra = {"use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in file.tensors}
    return {**_decoder(file, "qwen3", "Qwen3ForCausalLM"), **extra}


def _gemma(file: "GGUFFile", model_type: str, name: str, largest: int) -> dict[str, Any]:
    """The settings that Gemma 2 and 3 share. The files do not store the scale of the queries. llama.cpp recognises the
    27B model by its number of layers, and so does this: it divides by the width per head, all others by d_head."""
    base = _decoder(file, model_type, name)
    per_head = base["hidden_size"] // base["num_attention_heads"]
    base |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if base["num_hidden_layers"] == largest else base["head_dim"],
        "sliding_window": file.require(f"{file.architecture}.attention.sliding_window"),
        "attention_bias": False,
    }
    del base["hidden_act"]
    return base


def _gemma2(file: "GGUFFile") -> dict[str, Any]:
    base = _gemma(file, "gemma2", "Gemma2ForCausalLM", largest=46)
    sliding = [layer % 2 == 0 for layer in range(base["num_hidden_layers"])]
    return base | {
        "attn_logit_softcapping": file.metadata.get("gemma2.attn_logit_softcapping"),
        "final_logit_softcapping": file.metadata.get("gemma2.final_logit_softcapping"),
        "layer_types": ["sliding_attention" if local else "full_attention" for local in sliding],
    }


def _gemma3(file: "GGUFFile") -> dict[str, Any]:
    base = _gemma(file, "gemma3_text", "Gemma3ForCausalLM", largest=62)
    every = file.metadata.get("gemma3.attention.sliding_window_pattern", 6)
    sliding = [bool((layer + 1) % every) for layer in range(base["num_hidden_layers"])]
    return base | {
        "rope_local_base_freq": float(file.metadata.get("gemma3.rope.freq_base_swa", 10000.0)),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": file.metadata.get("gemma3.final_logit_softcapping"),
        "layer_types": ["sliding_attention" if local else "full_attention" for local in sliding],
    }


def _phi3(file: "GGUFFile") -> dict[str, Any]:
    base = _decoder(file, "phi3", "Phi3ForCausalLM")
    rotary = file.metadata.get("phi3.rope.dimension_count", base["head_dim"])
    base |= {
        "partial_rotary_factor": rotary / base["head_dim"],
        "sliding_window": file.metadata.get("phi3.attention.sliding_window") or None,
    }
    base["original_max_position_embeddings"] = file.metadata.get(
        "phi3.rope.scaling.original_context_length", base["max_position_embeddings"]
    )
    if "rope_factors_long.weight" in file.tensors:
        base["rope_scaling"] = {
            "rope_type": "longrope",
            "long_factor": file.tensor("rope_factors_long.weight").tolist(),
            "short_factor": file.tensor("rope_factors_short.weight").tolist(),
        }
    return base


def _gpt2(file: "GGUFFile") -> dict[str, Any]:
    return {
        **_common(file, "gpt2", "GPT2LMHeadModel"),
        "n_embd": file.require("gpt2.embedding_length"),
        "n_layer": _blocks(file),
        "n_head": _one(file, "gpt2.attention.head_count"),
        "n_positions": file.require("gpt2.context_length"),
        "n_inner": _one(file, "gpt2.feed_forward_length"),
        "layer_norm_epsilon": _eps(file.require("gpt2.attention.layer_norm_epsilon")),
        "activation_function": "gelu_new",
    }


def _gptneox(file: "GGUFFile") -> dict[str, Any]:
    width, heads = file.require("gptneox.embedding_length"), _one(file, "gptneox.attention.head_count")
    return {
        **_common(file, "gpt_neox", "GPTNeoXForCausalLM"),
        "hidden_size": width,
        "num_hidden_layers": _blocks(file),
        "num_attention_heads": heads,
        "intermediate_size": _one(file, "gptneox.feed_forward_length"),
        "max_position_embeddings": file.require("gptneox.context_length"),
        "layer_norm_eps": _eps(file.require("gptneox.attention.layer_norm_epsilon")),
        "use_parallel_residual": file.metadata.get("gptneox.use_parallel_residual", True),
        "rotary_pct": file.metadata.get("gptneox.rope.dimension_count", width // heads) / (width // heads),
        "rotary_emb_base": float(file.metadata.get("gptneox.rope.freq_base", 10000.0)),
        "hidden_act": "gelu",
        "attention_bias": True,
    }


def interleaved_to_halves(weight: Float[Tensor, "rows *columns"], n_heads: int) -> Float[Tensor, "rows *columns"]:
    """Reorder rows of a query or key matrix from llama.cpp's rotary pairs (2i, 2i+1) to the hub's (i, i + d_head/2).

    >>> interleaved_to_halves(torch.tensor([0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]), 1).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    pairs = weight.view(n_heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _undo_llama(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    if ".attn_q." in name:
        return interleaved_to_halves(weight, config["num_attention_heads"])
    if ".attn_k." in name:
        return interleaved_to_halves(weight, config["num_key_value_heads"])
    return weight


def _undo_gemma(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return weight - 1 if name.endswith("norm.weight") else weight  # the hub's Gemma computes x * (1 + weight)


def _undo_gpt2(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    # The hub's GPT-2 stores its matrices as (in, out).
    return weight.T.contiguous() if name.startswith("blk.") and weight.ndim == 2 else weight


def _undo_gptneox(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """Reorder from all queries, all keys, all values to (query, key, value) per head."""
    if ".attn_qkv." not in name:
        return weight
    apart = weight.view(3, config["num_attention_heads"], -1, *weight.shape[1:])
    return apart.transpose(0, 1).reshape(weight.shape)


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DECODER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_NEOX_TOP = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_NEOX = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_LAYER = "model.layers.{}"

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, _TOP, _LAYER, _DECODER, _undo_llama),
    "qwen2": Architecture(_qwen2, _TOP, _LAYER, _DECODER),
    "qwen3": Architecture(_qwen3, _TOP, _LAYER, _DECODER | _QK_NORM),
    "gemma2": Architecture(_gemma2, _TOP, _LAYER, _DECODER | _SANDWICH, _undo_gemma),
    "gemma3": Architecture(_gemma3, _TOP, _LAYER, _DECODER | _SANDWICH | _QK_NORM, _undo_gemma),
    "phi3": Architecture(_phi3, _TOP, _LAYER, _PHI3),
    "gpt2": Architecture(_gpt2, _GPT2_TOP, "transformer.h.{}", _GPT2, _undo_gpt2),
    "gptneox": Architecture(_gptneox, _NEOX_TOP, "gpt_neox.layers.{}", _NEOX, _undo_gptneox),
}
