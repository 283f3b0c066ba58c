"""What do scores for all 32,491 edges cost? GPT-2-small shape, 20 tokens, float32, 2 threads.

Against one forward and one backward pass per pair, by plain autograd on the same model and prompts: once with the
gradient by the embedding alone (what attribution needs), once by every weight (a training step's). The edges' slow way,
one exact run an edge, is timed on a stated part of them and scaled.
Run: python -m benchmarks.eap
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import hooklens as hl
from benchmarks import peers
from benchmarks.rounds import alternate, ratios, write
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import Bench

N_POS, RIGHT, WRONG = 20, 1000, 2000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--pairs", type=int, default=8)
    options.add_argument("--edges", type=int, default=32, help="exact runs that are timed of the 32,491")
    chosen = options.parse_args()
    torch.set_num_threads(2)
    model = peers.ours()
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(50257, (chosen.pairs, N_POS), generator=generator)
    corrupted = clean.clone()
    corrupted[:, N_POS // 2] = torch.randint(50257, (chosen.pairs,), generator=generator)
    metric = hl.logit_diff(model, answer=RIGHT, wrong_answer=WRONG)
    bench = Bench(model, PromptPairs(clean, corrupted, metric), "corrupted", keep=True)
    cut = ~torch.eye(bench.graph.n_edges, dtype=torch.bool)[:: bench.graph.n_edges // chosen.edges][: chosen.edges]
    runs: dict[str, Callable[[], Any]] = {
        "EAP, all edges": partial(eap, model, clean, corrupted, metric),
        "forward + backward, by the embedding": partial(plain, model, clean, metric, weights=False),
        "forward + backward, by every weight": partial(plain, model, clean, metric, weights=True),
        "forward": partial(forward, model, clean),
        f"exact runs, {chosen.edges} edges": partial(bench.run, cut),
    }
    for run in runs.values():
        run()
    seconds = alternate(runs, chosen.rounds)
    edges = circuit_graph(model).n_edges
    rows: list[dict[str, Any]] = []
    for name, each in seconds.items():
        found = ratios(seconds, "EAP, all edges", name)
        row = {"what": name, "seconds a pair (median)": sorted(each)[len(each) // 2] / chosen.pairs}
        rows.append(row | {f"EAP / this, {key}": value for key, value in found.items()})
    raw = {"pairs": chosen.pairs, "tokens": N_POS, "edges": edges, "seconds": seconds}
    write("eap", "Edge attribution patching against one forward and backward pass a pair", rows, raw)


def plain(model, clean: torch.Tensor, metric: Any, *, weights: bool) -> Any:
    """One forward and backward pass over all pairs at once, unembedding only what the metric reads."""
    if weights:
        value = metric(model(clean, logits_at=-1)).sum()
        return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    stream = model(clean, stop_at_layer=0).detach().requires_grad_()
    return torch.autograd.grad(metric(model(stream, start_at_layer=0, logits_at=-1)).sum(), stream)


def forward(model, clean: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(clean, logits_at=-1)


if __name__ == "__main__":
    main()
