"""The same GPT-2-small-shaped random weights in hooklens and in each peer."""

from typing import Any

import torch

from hooklens.model.config import Biases, HookedTransformerConfig, Rotary
from hooklens.model.transformer import HookedTransformer

SIZES: dict[str, Any] = {"n_layers": 12, "d_model": 768, "n_ctx": 1024, "n_heads": 12, "d_vocab": 50257}


def ours(seed: int = 0) -> HookedTransformer:
    """GPT-2-small shape, random weights, biases and norm weights that are not trivial."""
    model = HookedTransformer(HookedTransformerConfig(**SIZES, tie_word_embeddings=True), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
            elif name.startswith("blocks"):
                p.mul_(1.5)  # else twelve random layers leave the stream nearly as it was
    return model.eval()


def smollm2_shape(seed: int = 0) -> HookedTransformer:
    """SmolLM2-135M's shape with random weights, for a machine that the real ones do not reach."""
    cfg = HookedTransformerConfig(
        n_layers=30,
        d_model=576,
        n_ctx=8192,
        n_heads=9,
        n_key_value_heads=3,
        d_mlp=1536,
        gated_mlp=True,
        act_fn="silu",
        d_vocab=49152,
        normalization_type="RMS",
        positional_embedding_type=Rotary(base=100000.0),
        tie_word_embeddings=True,
        biases=Biases(qkv=False, o=False, mlp=False),
        model_name="SmolLM2-135M shape, random weights",
    )
    return HookedTransformer(cfg, seed=seed).eval()


def final_norm(model: HookedTransformer) -> Any:
    """The norm before the unembedding, which these models have."""
    return model.ln_final


def hugging_face(model: HookedTransformer) -> torch.nn.Module:
    """transformers' GPT-2 with these weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = {"attn_implementation": "sdpa", "tie_word_embeddings": True}
    peer, final = GPT2LMHeadModel(GPT2Config(**settings)).eval(), final_norm(model)
    state: dict[str, Any] = {"wte.weight": model.W_E, "wpe.weight": model.W_pos}
    for i, block in enumerate(model.blocks):
        attn, mlp, h = block.attn, block.mlp, f"h.{i}."
        state |= {h + "ln_1.weight": block.ln1.weight, h + "ln_1.bias": block.ln1.bias}
        state |= {h + "ln_2.weight": block.ln2.weight, h + "ln_2.bias": block.ln2.bias}
        state[h + "attn.c_attn.weight"] = torch.cat([x.weight for x in (attn.q, attn.k, attn.v)]).T
        state[h + "attn.c_attn.bias"] = torch.cat([x.bias for x in (attn.q, attn.k, attn.v)])
        for name, linear in (("attn.c_proj", attn.o), ("mlp.c_fc", mlp.in_), ("mlp.c_proj", mlp.out)):
            state |= {f"{h}{name}.weight": linear.weight.T, f"{h}{name}.bias": linear.bias}
    state |= {"ln_f.weight": final.weight, "ln_f.bias": final.bias}
    peer.transformer.load_state_dict({k: v.detach().clone() for k, v in state.items()}, strict=False)
    return peer


def transformer_lens(model: HookedTransformer, device: str = "cpu") -> Any:
    """TransformerLens 3's HookedTransformer with these weights, nothing folded."""
    from transformer_lens import HookedTransformer as Theirs
    from transformer_lens import HookedTransformerConfig as TheirConfig

    cfg = model.cfg
    peer = Theirs(
        TheirConfig(
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            n_ctx=cfg.n_ctx,
            n_heads=cfg.n_heads,
            d_head=cfg.d_head,
            d_mlp=cfg.d_mlp,
            d_vocab=cfg.d_vocab,
            act_fn=cfg.act_fn,
            normalization_type="LN",
            device=device,
        )
    )
    state: dict[str, Any] = {"embed.W_E": model.W_E, "pos_embed.W_pos": model.W_pos, "unembed.W_U": model.W_U}
    state["unembed.b_U"] = torch.zeros(cfg.d_vocab)
    final = final_norm(model)
    state |= {"ln_final.w": final.weight, "ln_final.b": final.bias}
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}."
        state |= {
            f"{name}ln{n}.{k}": getattr(getattr(block, f"ln{n}"), w)
            for n in (1, 2)
            for k, w in (("w", "weight"), ("b", "bias"))
        }
        state |= {
            f"{name}attn.{w}": getattr(block.attn, w) for w in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
        }
        state |= {f"{name}mlp.{w}": getattr(block.mlp, w) for w in ("W_in", "W_out", "b_in", "b_out")}
    missing = peer.load_state_dict({k: v.detach().clone() for k, v in state.items()}, strict=False)
    assert all(key.endswith(("mask", "IGNORE")) for key in missing.missing_keys), missing
    return peer.eval()
