"""What do hook points cost? Plain forward against transformers with sdpa, and a full cache against our plain forward.

GPT-2-small shape, the same weights, float32, 2 threads, 1 x 64 and 8 x 128 tokens. Run: python -m benchmarks.forward
"""

import argparse
import contextvars
import statistics
from collections.abc import Callable
from typing import Any

import torch

import hooklens as hl
from benchmarks import peers
from benchmarks.rounds import alternate, ratios, write
from hooklens.model.linear import packing_gain


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=15)
    chosen = options.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    model = peers.ours()
    peer = peers.hugging_face(model)
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {"packing gain": packing_gain()}
    context = contextvars.copy_context()  # one in which a packed scope stays open, so that packing is not timed
    packed = hl.packed_linears(rows=1024)  # kept: a scope that nobody holds ends
    context.run(packed.__enter__)
    for shape in ((1, 64), (8, 128)):
        tokens = torch.randint(50257, shape, generator=torch.Generator().manual_seed(0))
        runs = runs_on(model, peer, tokens, context)
        gap = float((runs["hooklens"]() - runs["transformers, sdpa"]()).abs().max())
        for run in runs.values():
            run()
        seconds = alternate(runs, chosen.rounds)
        name = f"{shape[0]} x {shape[1]}"
        raw[name] = {"seconds": seconds, "largest logit difference": gap}
        rows += table(name, seconds)
    write("forward", "Plain forward and cache", rows, raw)


def runs_on(model, peer, tokens, context: contextvars.Context) -> dict[str, Callable[[], Any]]:
    return {
        "transformers, sdpa": lambda: peer(tokens, use_cache=False).logits,
        "hooklens": lambda: model(tokens),
        "hooklens, packed": lambda: context.run(model, tokens),
        "hooklens, run_with_cache": lambda: model.run_with_cache(tokens),
    }


def table(name: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    against = {
        "hooklens": "transformers, sdpa",
        "hooklens, packed": "transformers, sdpa",
        "hooklens, run_with_cache": "hooklens",
    }
    rows = []
    for who, each in seconds.items():
        row: dict[str, Any] = {"tokens": name, "who": who, "median ms": 1000 * statistics.median(each)}
        if who in against:
            row |= {"ratio to": against[who]} | ratios(seconds, who, against[who])
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
