"""Is an exact sweep faster than the loops that people run? GPT-2-small shape, 20 tokens, float32, 2 threads.

Needs transformer-lens==3.9.0 and nnsight beside hooklens, in an environment of their own.
Run: python -m benchmarks.sweeps
The peer's loop over all 2,880 (layer, head, position) patches is timed on a stated part of them and scaled.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import hooklens as hl
from benchmarks import peers
from benchmarks.rounds import alternate, write
from hooklens.model.linear import Linear

N_POS, RIGHT, WRONG = 20, 1000, 2000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--part", type=int, default=12, help="the peer runs one of this many of the 2,880 patches")
    options.add_argument("--ours-only", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    model = peers.ours()
    metric = hl.logit_diff(model, answer=RIGHT, wrong_answer=WRONG)
    clean, second, halfway = prompts()
    cases: dict[str, tuple[str, str, torch.Tensor]] = {
        "resid_pre, 240, differs at the 2nd token": ("resid_pre", "layer x pos", second),
        "resid_pre, 240, differs half way": ("resid_pre", "layer x pos", halfway),
        "z by head, 144, differs at the 2nd token": ("z", "layer x head", second),
        "z by head and position, 2,880, 2nd token": ("z", "layer x head x pos", second),
    }
    peer = None if chosen.ours_only else peers.transformer_lens(model)
    nn = None if chosen.ours_only else nnsight_model(model)
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for name, (site, by, corrupted) in cases.items():
        runs: dict[str, Callable[[], Any]] = {
            "hooklens": partial(hl.patch, model, clean, corrupted, metric, site=site, by=by)
        }
        runs["hooklens, torch's linear"] = partial(unpacked, model, clean, corrupted, metric, site, by)
        scale = 1.0
        if peer is not None:
            many = by == "layer x head x pos"
            scale = float(chosen.part) if many else 1.0
            runs["TransformerLens 3.9.0"] = partial(theirs, peer, clean, corrupted, by, chosen.part if many else 1)
            if by == "layer x pos" and nn is not None:
                runs["nnsight, 20 invokes a trace"] = partial(nnsight_sweep, nn, model, clean, corrupted)
        out: dict[str, Any] = {}
        for key in [key for key in runs if key.startswith("hooklens")]:
            runs[key]()  # warmed up; a loop of a minute needs none
        seconds = alternate({key: partial(keep, out, key, run) for key, run in runs.items()}, chosen.rounds)
        if "TransformerLens 3.9.0" in seconds:
            seconds["TransformerLens 3.9.0"] = [s * scale for s in seconds["TransformerLens 3.9.0"]]
        rows += summary(name, seconds, out)
        raw[name] = {"seconds": seconds, "peer part": 1 / scale}
    raw["share of a plain product"] = share_of_peak(model, clean, second, metric, chosen.rounds)
    write("sweeps", "Exact sweeps against the loop", rows, raw)


def keep(out: dict[str, Any], key: str, run: Callable[[], Any]) -> None:
    out[key] = run()


def share_of_peak(model, clean, corrupted, metric, rounds: int) -> dict[str, float]:
    """A resid_pre sweep's linear operations a second, over those of one packed product of 2,400 rows."""
    counted: list[int] = []
    plain = Linear.forward

    def counting(self: Linear, x: torch.Tensor) -> torch.Tensor:
        counted.append(2 * x.numel() // x.shape[-1] * self.weight.numel())
        return plain(self, x)

    Linear.forward = counting  # type: ignore[method-assign]  # a torch hook would switch the engine off
    try:
        hl.patch(model, clean, corrupted, metric)
    finally:
        Linear.forward = plain  # type: ignore[method-assign]
    layer, x = model.blocks[0].mlp.in_, torch.randn(2400, 768)
    with hl.packed_linears(rows=1024):
        layer(x)
        runs = {"sweep": lambda: hl.patch(model, clean, corrupted, metric), "product": lambda: layer(x)}
        seconds = alternate(runs, max(rounds, 5))
    sweep = sum(counted) / statistics.median(seconds["sweep"]) / 1e9
    product = 2 * x.numel() * layer.weight.shape[0] / statistics.median(seconds["product"]) / 1e9
    return {
        "sweep GFLOP/s": sweep,
        "product GFLOP/s": product,
        "share": sweep / product,
        "sweep GFLOP": sum(counted) / 1e9,
    }


def prompts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(50257, (1, N_POS), generator=generator)
    second, halfway = clean.clone(), clean.clone()
    second[0, 1] = (clean[0, 1] + 1) % 50257
    halfway[0, N_POS // 2] = (clean[0, N_POS // 2] + 1) % 50257
    return clean, second, halfway


def unpacked(model, clean, corrupted, metric, site: str, by: str) -> Any:
    with hl.packed_linears(enabled=False):
        return hl.patch(model, clean, corrupted, metric, site=site, by=by)


def theirs(peer, clean, corrupted, by: str, part: int) -> torch.Tensor:
    """TransformerLens's own functions; for one part of layer x head x position, its own generic loop on those rows."""
    from transformer_lens import patching

    _, cache = peer.run_with_cache(clean)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, RIGHT] - logits[0, -1, WRONG]

    if by == "layer x pos":
        return patching.get_act_patch_resid_pre(peer, corrupted, cache, metric)
    if by == "layer x head":
        return patching.get_act_patch_attn_head_out_all_pos(peer, corrupted, cache, metric)
    import itertools

    import pandas

    grid = [(layer, pos, head) for layer, pos, head in itertools.product(range(12), range(N_POS), range(12))][::part]
    frame = pandas.DataFrame(grid, columns=["layer", "pos", "head"])
    return patching.generic_activation_patch(
        peer, corrupted, cache, metric, patching.layer_pos_head_vector_patch_setter, "z", index_df=frame
    )


def nnsight_model(model) -> Any:
    """nnsight's LanguageModel, which alone batches invokes; its tokenizer has a word for every id."""
    from nnsight import LanguageModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(50257)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
    return LanguageModel(peers.hugging_face(model), tokenizer=tokenizer)


def nnsight_sweep(nn, model, clean, corrupted) -> torch.Tensor:
    """Every layer in one trace of 20 invokes, one a position."""
    _, cache = model.run_with_cache(clean, names="resid_pre")
    values = []
    for layer in range(12):
        saved = []
        with nn.trace() as tracer:
            for pos in range(N_POS):
                with tracer.invoke(corrupted):
                    nn.transformer.h[layer].input[0, pos] = cache["resid_pre", layer][0, pos]
                    logits = nn.lm_head.output[0, -1]
                    saved.append((logits[RIGHT] - logits[WRONG]).save())
        values.append(torch.stack([torch.as_tensor(x) for x in saved]))
    return torch.stack(values)


def summary(name: str, seconds: dict[str, list[float]], out: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a contender: median seconds, and how many times faster hooklens was, round by round."""
    rows = []
    mine = out["hooklens"].values
    for who, each in seconds.items():
        faster = [a / b for a, b in zip(each, seconds["hooklens"], strict=True)]
        theirs = out[who].values if hasattr(out[who], "values") and not callable(out[who].values) else out[who]
        if theirs.ndim == 1 < mine.ndim:  # the peer's part of layer x head x position, in its order
            full, mine = mine, mine.permute(0, 2, 1).reshape(-1)[:: mine.numel() // len(theirs)]
        else:
            full = mine
        same = isinstance(theirs, torch.Tensor) and theirs.shape == mine.shape
        row = {"sweep": name, "who": who, "median s": statistics.median(each)}
        row |= {
            "times hooklens (median)": statistics.median(faster),
            "min": min(faster),
            "max": max(faster),
            "n": len(each),
        }
        row["largest difference"] = f"{float((theirs - mine).abs().max()):.1e}" if same else "not compared"
        mine = full
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
