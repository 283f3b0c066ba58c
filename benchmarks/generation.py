"""Is greedy generation faster than transformers', with the same tokens? SmolLM2-135M, float32, KV cache, one prompt.

Both hold the same weights and take turns in one process. Run: python -m benchmarks.generation
"""

import argparse
import statistics
from typing import Any

import torch
import transformers

from benchmarks import peers
from benchmarks.rounds import alternate, ratios, write
from hooklens.model.linear import packing_gain
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.loading import load

ASSET = "smollm2-135m-instruct"
PROMPT = "When Mary and John went to the store, John gave a drink to"
BAR = 1.5
NAMES = {
    "unembed.linear": "lm_head",
    "embed.weight": "embed_tokens.weight",
    "blocks.": "layers.",
    "ln_final": "norm",
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    **{f"attn.{x}.": f"self_attn.{x}_proj." for x in "qkvo"},
    "mlp.in_": "mlp.up_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.out": "mlp.down_proj",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--tokens", type=int, default=100)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--random", action="store_true", help="random weights of its shape: nothing to download")
    options.add_argument("--dry", action="store_true", help="print the seconds and write no file")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    model = peers.smollm2_shape() if chosen.random else load(ASSET)
    tokens = torch.arange(2, 17)[None] if chosen.random else model.to_tokens(PROMPT)
    peer = peer_of(model)
    runs = {
        "hooklens": lambda: ours(model, tokens, chosen.tokens),
        "transformers": lambda: theirs(peer, tokens, chosen.tokens),
    }
    produced = {name: run() for name, run in runs.items()}  # also the warm-up
    seconds = alternate(runs, chosen.rounds)
    same = produced["hooklens"] == produced["transformers"]
    record(model.cfg.model_name, seconds, same, chosen.tokens, dry=chosen.dry)


def record(who: str, seconds: dict[str, list[float]], same: bool, n: int, *, dry: bool) -> None:
    rows = [
        {"": name, "median s": statistics.median(each), "min s": min(each), "max s": max(each),
         "tokens/s": n / statistics.median(each)}
        for name, each in seconds.items()
    ]  # fmt: skip
    faster = ratios(seconds, "transformers", "hooklens")
    title = (
        f"Greedy generation of {n} tokens, {who}, float32: {faster['median']:.2f}x transformers' generate "
        f"({faster['min']:.2f} to {faster['max']:.2f} in {faster['n']} rounds; bar {BAR}), same tokens: {same}"
    )
    if dry:
        print(title, *rows, sep="\n")
    else:
        raw = {"seconds": seconds, "speedup": faster, "same_tokens": same, "packing gain of one row": packing_gain(1)}
        write("generation", title, rows, raw)


def peer_of(model: HookedTransformer) -> torch.nn.Module:
    """The same weights in transformers' Llama."""
    cfg = model.cfg
    settings: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = transformers.LlamaConfig(
        vocab_size=cfg.d_vocab,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_mlp,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_key_value_heads,
        max_position_embeddings=cfg.n_ctx,
        rms_norm_eps=cfg.normalization_type.eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.positional_embedding_type.base},
        tie_word_embeddings=cfg.tie_word_embeddings,
        **settings,
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = peer.load_state_dict(
        {theirs: p for name, p in model.state_dict().items() for theirs in [their_name(name)]}, strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return peer


def their_name(name: str) -> str:
    for our, their in NAMES.items():
        name = name.replace(our, their)
    return name if name.startswith("lm_head") else f"model.{name}"


def ours(model: HookedTransformer, tokens: torch.Tensor, n: int) -> list[int]:
    return model.generate(tokens, n, stop=()).new_tokens[0].tolist()


def theirs(peer: Any, tokens: torch.Tensor, n: int) -> list[int]:
    mask = torch.ones_like(tokens)
    with torch.inference_mode():
        # min_new_tokens would switch on a logits processor that costs time; no stop token is the fair equal.
        out = peer.generate(
            tokens, attention_mask=mask, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, tokens.shape[1] :].tolist()


if __name__ == "__main__":
    main()
