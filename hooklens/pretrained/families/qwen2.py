"""Qwen 2 and 2.5: a Llama with biases on q, k and v only, and optionally a window on the later layers."""

from dataclasses import replace

from hooklens.model.config import Biases, HookedTransformerConfig, MaskPart
from hooklens.pretrained.families import llama
from hooklens.pretrained.hf_config import HFConfig


def masks(hf: HFConfig, n_layers: int) -> MaskPart | tuple[MaskPart, ...]:
    """The mask of every layer: a window from layer `max_window_layers` on, if the file enables it."""
    windowed = hf.flag("use_sliding_window", False)
    first = hf.get("max_window_layers", 28)
    kinds = ["sliding_attention" if windowed and layer >= first else "full_attention" for layer in range(n_layers)]
    return hf.masks(hf.size("sliding_window", 4096) if windowed else None, hf.layer_types(kinds))


def config(hf: HFConfig) -> HookedTransformerConfig:
    """Convert a Qwen 2 config.json."""
    cfg = llama.decoder(hf.with_defaults({"max_position_embeddings": 32768}))
    return cfg.replace(mask=masks(hf, cfg.n_layers), biases=Biases(qkv=True, o=False, mlp=False))


FAMILY = replace(
    llama.FAMILY,
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    config=config,
)
