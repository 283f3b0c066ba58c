"""Is greedy generation faster than transformers', with the same tokens? SmolLM2-135M, float32, KV cache, one prompt.

Both run in one process, taking turns, so that a busy machine slows both. Run: python benchmarks/generation.py
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

import hooklens
from hooklens.model.linear import packing_gain
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.load import load

ASSET = "smollm2-135m-instruct"
PROMPT = "When Mary and John went to the store, John gave a drink to"
RESULTS = Path(__file__).parent / "results"
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
    options.add_argument("--dry", action="store_true", help="print, write no file")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    model = load(ASSET)
    tokens = model.to_tokens(PROMPT)
    peer = peer_of(model)
    runs = {
        "hooklens": lambda: ours(model, tokens, chosen.tokens),
        "transformers": lambda: theirs(peer, tokens, chosen.tokens),
    }
    produced = {name: run() for name, run in runs.items()}  # also the warm-up
    seconds = alternate(runs, chosen.rounds)
    record = report(seconds, produced, tokens.shape[1], chosen)
    print(json.dumps(record, indent=1))
    if not chosen.dry:
        write(record)


def peer_of(model: HookedTransformer) -> torch.nn.Module:
    """The same weights in transformers' Llama."""
    cfg = model.cfg
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
        attn_implementation="sdpa",
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


def theirs(peer: torch.nn.Module, tokens: torch.Tensor, n: int) -> list[int]:
    mask = torch.ones_like(tokens)
    with torch.inference_mode():
        # min_new_tokens would switch on a logits processor that costs time; no stop token is the fair equal.
        out = peer.generate(
            tokens, attention_mask=mask, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, tokens.shape[1] :].tolist()


def alternate(runs: dict[str, Callable[[], list[int]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, the order reversed in every other round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]], produced: dict[str, list[int]], n_prompt: int, chosen) -> dict:
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    speedup = medians["transformers"] / medians["hooklens"]
    return {
        "question": "seconds for greedy generation, one prompt, float32, KV cache",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu(), "threads": torch.get_num_threads(), "packed_linear_gain": round(packing_gain(), 2)},
        "versions": {m.__name__: getattr(m, "__version__", "") for m in (torch, transformers, hooklens)},
        "model": ASSET,
        "prompt_tokens": n_prompt,
        "new_tokens": chosen.tokens,
        "rounds": len(seconds["hooklens"]),
        "seconds": {name: [round(s, 4) for s in each] for name, each in seconds.items()},
        "median_seconds": {name: round(s, 4) for name, s in medians.items()},
        "speedup": round(speedup, 3),
        "bar": BAR,
        "bar_met": speedup >= BAR,
        "same_tokens": produced["hooklens"] == produced["transformers"],
    }


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def write(record: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{record['date'][:10]}_generation"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    rows = "\n".join(
        f"| {name} | {median:.2f} | {min(record['seconds'][name]):.2f} to {max(record['seconds'][name]):.2f} "
        f"| {record['new_tokens'] / median:.1f} |"
        for name, median in record["median_seconds"].items()
    )
    stem.with_suffix(".md").write_text(
        f"# Greedy generation, {record['new_tokens']} tokens after {record['prompt_tokens']}, {record['model']}\n\n"
        f"| | median s | range | tokens/s |\n|---|---:|---:|---:|\n{rows}\n\n"
        f"hooklens is {record['speedup']:.2f}x as fast (bar {record['bar']}x), same tokens: {record['same_tokens']}. "
        f"{record['rounds']} rounds in turn, float32, {record['machine']['threads']} threads, "
        f"{record['machine']['cpu']}, torch {record['versions']['torch']}, "
        f"transformers {record['versions']['transformers']}.\n"
    )


if __name__ == "__main__":
    main()
