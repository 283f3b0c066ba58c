"""What does a logit lens of all layers cost beside the forward pass and the unembeddings that it needs?

GPT-2-small shape with random weights, and SmolLM2; float32, 2 threads. The bar: at most 1.5 times the sum of one
forward pass and one unembedding of every stream. Run: python -m benchmarks.lens
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import hooklens as hl
from benchmarks import peers
from benchmarks.rounds import alternate, ratios, write
from hooklens.plugins.lens.layer_lens import logit_lens
from hooklens.plugins.lens.logit_attribution import direct_logit_attribution
from hooklens.plugins.lens.reading import packing, streams_of

LENS, NEEDED = "logit lens", "forward and unembeddings"
ATTRIBUTION = "direct logit attribution"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--gpt2-only", action="store_true")
    options.add_argument("--smollm2-only", action="store_true")
    options.add_argument("--random", action="store_true", help="random weights of SmolLM2's shape: nothing to download")
    chosen = options.parse_args()
    torch.set_num_threads(2)
    models = {} if chosen.smollm2_only else {"GPT-2-small shape": peers.ours()}
    if not chosen.gpt2_only:
        smollm2 = peers.smollm2_shape() if chosen.random else hl.load("smollm2-135m-instruct")
        models[smollm2.cfg.model_name] = smollm2
    rows, raw = [], {}
    for name, model in models.items():
        for shape in ((1, 16), (1, 128), (4, 128)):
            tokens = torch.randint(model.cfg.d_vocab, shape, generator=torch.Generator().manual_seed(0))
            runs: dict[str, Callable[[], Any]] = {
                NEEDED: partial(needed, model, tokens),
                LENS: partial(logit_lens, model, tokens),
                ATTRIBUTION: partial(direct_logit_attribution, model, tokens, answer=1, wrong_answer=2),
                "forward": partial(forward, model, tokens),
            }
            for run in runs.values():
                run()
            seconds = alternate(runs, chosen.rounds)
            case = f"{name}, {shape[0]} x {shape[1]}"
            raw[case] = seconds
            rows += table(case, seconds)
    write("lens", "A logit lens against the forward pass and the unembeddings that it needs", rows, raw)


def needed(model, tokens: torch.Tensor) -> None:
    """One forward pass that keeps the streams, and the plain unembedding of each, nothing done with the logits.

    Packed as the lens packs; a layer at a time, since the logits of all would not fit.
    """
    with torch.no_grad(), packing(tokens.numel()):
        streams = streams_of(model, tokens)
        with packing(streams.shape[0] * tokens.numel()):
            for stream in streams:
                model.read_out(stream)


def forward(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


def table(case: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    against = {LENS: NEEDED, ATTRIBUTION: "forward"}
    rows = []
    for who, each in seconds.items():
        row: dict[str, Any] = {"case": case, "who": who, "median ms": 1000 * statistics.median(each)}
        if who in against:
            row |= {"ratio to": against[who]} | ratios(seconds, who, against[who])
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
