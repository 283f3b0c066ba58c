"""Undo the changes of llama.cpp's conversion to a model's names, layouts and configuration.

One table gives our name of each tensor in a GGUF file, from which the family's own map gives the name on the hub. An
`Architecture` adds what differs: its settings, and the tensors that the conversion rearranged.

Reference: convert_hf_to_gguf.py in the llama.cpp repository, each `undo` inverts its conversion.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import FileRefused
from hooklens.core.files import reading
from hooklens.model.config import Llama3Scaling
from hooklens.pretrained.builder import listed
from hooklens.pretrained.families import families
from hooklens.pretrained.gguf import GGUFFile
from hooklens.pretrained.weight_map import Family, Names

Settings = dict[str, Any]
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_FOR_POSITIONS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}  # config has them

#: Our layers by llama.cpp's names.
LAYERS: dict[str, Names] = {
    "token_embd": "embed",
    "position_embd": "pos_embed",
    "output_norm": "ln_final",
    "output": "unembed.linear",
    "attn_norm": "ln1",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_qkv": ("attn.q", "attn.k", "attn.v"),
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_output": "attn.o",
    "post_attention_norm": "ln1_post",
    "ffn_norm": "ln2",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.in_",
    "ffn_down": "mlp.out",
    "post_ffw_norm": "ln2_post",
}
_FUSED: dict[str, Names] = {"ffn_up": ("mlp.gate", "mlp.in_")}  # in families that fuse these two


@dataclass(frozen=True)
class Architecture:
    """How one llama.cpp architecture is represented on the hub.

    `keys` maps settings of config.json to the file's names for them, `more` computes the other settings, and `undo`
    restores the layout of a tensor.
    """

    family: str
    keys: dict[str, str]
    more: Callable[[GGUFFile, Settings], Settings]
    undo: Callable[[str, Tensor, Settings], Tensor] = lambda name, weight, config: weight


def find_architecture(file: GGUFFile) -> Architecture:
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


def hf_names(file: GGUFFile) -> dict[str, str]:
    """The hub name of each tensor in the file; a tensor without one raises an error."""
    family = families()[find_architecture(file).family]
    skipped = _FOR_POSITIONS | ({"output.weight"} if _output_is_embedding(file) else set())
    names = {name: _hf_name(family, name) for name in file.tensors if name not in skipped}
    if unknown := [name for name, hf_name in names.items() if hf_name is None]:
        raise FileRefused(
            f"{file.path.name} has tensors that a {file.architecture!r} model does not have: {listed(unknown)}; it "
            "may be another architecture under this name, or contain an adapter"
        )
    return {name: str(hf_name) for name, hf_name in names.items()}


def hf_config(file: GGUFFile) -> Settings:
    """The model's `config.json` as it would be on the hub, as far as the computation depends on it."""
    with reading(file.path, "a model's configuration"):
        return _settings(file)


def _settings(file: GGUFFile) -> Settings:
    arch, embedding = find_architecture(file), file.tensors.get("token_embd.weight")
    family = families()[arch.family]
    _check_blocks(file)
    if embedding is None:
        raise FileRefused(f"{file.path.name} has no tensor 'token_embd.weight': it is an adapter or part of a model")
    config = {
        "model_type": family.model_types[0],
        "architectures": [family.architectures[0]],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": _output_is_embedding(file),
        # Absent ids are None on purpose: a family's default may lie outside this vocabulary.
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    config |= {theirs: _decimal(_one(file, key)) for theirs, key in arch.keys.items()}
    return config | arch.more(file, config)


def hf_tensors(file: GGUFFile, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    """The weights under their Hugging Face names and in that layout, one at a time.

    Undoes the changes of the conversion to GGUF (rotary rows of Llama, `1 + weight` norms of Gemma, transposed and
    regrouped matrices of GPT-2 and GPT-NeoX). Raises before the first tensor if any tensor has an unknown name or type.
    """
    names, config, undo = hf_names(file), hf_config(file), find_architecture(file).undo

    def converted(name: str, weight: Tensor) -> Tensor:
        with reading(file.path, f"the tensor {name!r}"):  # its shape may not be what the metadata say
            return undo(name, weight, config).to(dtype)

    return ((names[name], converted(name, weight)) for name, weight in file.read(names))


def _hf_name(family: Family, name: str) -> str | None:
    block, part, suffix = _split(name)
    for table in (LAYERS, _FUSED):
        if part in table and (layer := family.hub_name(table[part], block)) is not None:
            return f"{layer}.{suffix}"
    return None


def _split(name: str) -> tuple[int | None, str, str]:
    """
    >>> _split("blk.3.attn_q.weight"), _split("output.weight")
    ((3, 'attn_q', 'weight'), (None, 'output', 'weight'))
    """
    if match := _BLOCK.fullmatch(name):
        return int(match[1]), match[2], match[3]
    part, _, suffix = name.rpartition(".")
    return None, part, suffix


def _output_is_embedding(file: GGUFFile) -> bool:
    """Whether the model is tied: no output matrix, or (older conversions of GPT-2) a second copy of the embedding."""
    output, embedding = file.tensors.get("output.weight"), file.tensors.get("token_embd.weight")
    if output is None or embedding is None:
        return output is None
    if (output.shape, output.kind) != (embedding.shape, embedding.kind):
        return False
    with open(file.path, "rb") as first, open(file.path, "rb") as second:
        first.seek(output.offset)
        second.seek(embedding.offset)
        left = output.nbytes
        while left > 0:
            n = min(left, 1 << 20)
            if first.read(n) != second.read(n):
                return False
            left -= n
    return True


def _check_blocks(file: GGUFFile) -> None:
    """Refuse a wrong number of blocks. Each block has its own tensors, so there are at least as many tensors."""
    n_blocks = file.require(f"{file.architecture}.block_count")
    if type(n_blocks) is not int or not 0 < n_blocks <= len(file.tensors):
        raise FileRefused(
            f"{file.path.name}: {file.architecture}.block_count is {n_blocks!r:.80}, and the file has "
            f"{len(file.tensors)} tensors; convert the model again"
        )


def _one(file: GGUFFile, key: str, default: Any = None) -> Any:
    """A setting of the architecture, the same for every layer; some files give a list, one value a layer."""
    key = f"{file.architecture}.{key}"
    value = file.require(key) if default is None else file.metadata.get(key, default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise FileRefused(
                f"{file.path.name}: {key} differs between layers ({value}); one value for all layers is needed"
            )
        value = value[0]
    return value


def _decimal(value: Any) -> Any:
    """Convert the file's float32 to the decimal number it stands for; other values stay as they are.

    >>> _decimal(9.999999747378752e-06), _decimal(8)
    (1e-05, 8)
    """
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _decoder(file: GGUFFile, config: Settings) -> Settings:
    """The settings of a Llama-like decoder."""
    n_heads = config["num_attention_heads"]
    return {
        "num_key_value_heads": _one(file, "attention.head_count_kv", n_heads),
        "head_dim": _one(file, "attention.key_length", config["hidden_size"] // n_heads),
        "rope_theta": float(_one(file, "rope.freq_base", 10000.0)),
        "rope_scaling": _scaling(file),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _scaling(file: GGUFFile) -> Settings | None:
    """The scaling of the rotary frequencies for long contexts, or None."""
    names = ("type", "factor", "original_context_length")
    kind, factor, original = (file.metadata.get(f"{file.architecture}.rope.scaling.{name}") for name in names)
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, original or 8192)
    if kind in (None, "none") or factor is None:
        return None
    scaling = {"rope_type": kind, "factor": float(factor)}
    return scaling if original is None else scaling | {"original_max_position_embeddings": original}


def _llama3_scaling(file: GGUFFile, original: int) -> Settings | None:
    """The file stores only one factor per frequency; recover the settings they came from, and check them."""
    seen = file.tensor("rope_freqs.weight", torch.float64)
    theta, n = float(_one(file, "rope.freq_base", 10000.0)), len(seen)
    # The slowest frequency carries the full factor, except in models too small to have one slow enough.
    factor = round(seen.max().item(), 4)
    if factor == 1.0:
        return None
    scaling = Llama3Scaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_n_ctx=original)
    frequencies = theta ** -(torch.arange(n, dtype=torch.float64) / n)
    expected = frequencies / scaling.scale(frequencies)
    if not torch.allclose(seen, expected, rtol=1e-4):
        raise FileRefused(
            f"{file.path.name}: rope_freqs.weight is {seen.tolist()[:4]}..., but {scaling} gives "
            f"{expected.tolist()[:4]}...; only Llama 3's scaling is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _gemma(file: GGUFFile, config: Settings) -> Settings:
    """The settings that Gemma 2 and 3 share. The files do not store the scale of the queries. llama.cpp recognises the
    27B model by its number of layers, and so does this: it divides by the width per head, all others by d_head."""
    more, arch = _decoder(file, config), file.architecture
    largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[arch]
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return more | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if largest else more["head_dim"],
        "sliding_window": _one(file, "attention.sliding_window"),
        "attn_logit_softcapping": file.metadata.get(f"{arch}.attn_logit_softcapping"),
        "final_logit_softcapping": file.metadata.get(f"{arch}.final_logit_softcapping"),
    }


def _gemma3(file: GGUFFile, config: Settings) -> Settings:
    return _gemma(file, config) | {
        "rope_local_base_freq": float(_one(file, "rope.freq_base_swa", 10000.0)),
        "sliding_window_pattern": _one(file, "attention.sliding_window_pattern", 6),
    }


def _phi3(file: GGUFFile, config: Settings) -> Settings:
    more, n_ctx = _decoder(file, config), config["max_position_embeddings"]
    more |= {
        "partial_rotary_factor": _one(file, "rope.dimension_count", more["head_dim"]) / more["head_dim"],
        "sliding_window": file.metadata.get("phi3.attention.sliding_window") or None,
        "original_max_position_embeddings": _one(file, "rope.scaling.original_context_length", n_ctx),
    }
    if "rope_factors_long.weight" in file.tensors:
        more["rope_scaling"] = {"rope_type": "longrope"} | {
            f"{name}_factor": file.tensor(f"rope_factors_{name}.weight").tolist() for name in ("long", "short")
        }
    return more


def _gptneox(file: GGUFFile, config: Settings) -> Settings:
    d_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "use_parallel_residual": _one(file, "use_parallel_residual", True),
        "rotary_pct": _one(file, "rope.dimension_count", d_head) / d_head,
        "rotary_emb_base": float(_one(file, "rope.freq_base", 10000.0)),
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


def _undo_llama(name: str, weight: Tensor, config: Settings) -> Tensor:
    if ".attn_q." in name:
        return interleaved_to_halves(weight, config["num_attention_heads"])
    if ".attn_k." in name:
        return interleaved_to_halves(weight, config["num_key_value_heads"])
    return weight


def _undo_gemma(name: str, weight: Tensor, config: Settings) -> Tensor:
    return weight - 1 if name.endswith("norm.weight") else weight  # the hub's Gemma computes x * (1 + weight)


def _undo_gpt2(name: str, weight: Tensor, config: Settings) -> Tensor:
    # The hub's GPT-2 stores its matrices as (in, out).
    return weight.T.contiguous() if name.startswith("blk.") and weight.ndim == 2 else weight


def _undo_gptneox(name: str, weight: Tensor, config: Settings) -> Tensor:
    """Reorder from all queries, all keys, all values to (query, key, value) per head."""
    if ".attn_qkv." not in name:
        return weight
    apart = weight.view(3, config["num_attention_heads"], -1, *weight.shape[1:])
    return apart.transpose(0, 1).reshape(weight.shape)


_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
_DECODER = _SIZES | {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_GPTNEOX = _SIZES | {"layer_norm_eps": "attention.layer_norm_epsilon"}
_GPT2 = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _DECODER, _decoder, _undo_llama),
    "qwen2": Architecture("qwen2", _DECODER, _decoder),
    "qwen3": Architecture("qwen3", _DECODER, _decoder),
    "gemma2": Architecture("gemma2", _DECODER, _gemma, _undo_gemma),
    "gemma3": Architecture("gemma3", _DECODER, _gemma3, _undo_gemma),
    "phi3": Architecture("phi3", _DECODER, _phi3),
    "gpt2": Architecture("gpt2", _GPT2, lambda file, config: {"activation_function": "gelu_new"}, _undo_gpt2),
    "gptneox": Architecture("gpt_neox", _GPTNEOX, _gptneox, _undo_gptneox),
}
