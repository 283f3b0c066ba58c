"""Sets K of a circuit's edges that are taken away, to see what holds without them: one node's, several nodes', any."""

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.plugins.circuits.graph import CircuitGraph

Subsets = Bool[Tensor, "set edge"]


def subsets(
    graph: CircuitGraph, kept: Bool[Tensor, "edge"], n: int, draw: torch.Generator
) -> tuple[Subsets, list[str]]:
    """`n` sets of kept edges, and what each holds: nothing; then in turn a node's, another's, some edges, some nodes'.

    A node's edges are those that it writes; the embedding is left in place. Each random set has a share of its own,
    drawn between none and all. The single nodes are all different ones, as far as there are enough.

    >>> graph = CircuitGraph(1, 2, 2)
    >>> kept = graph.mask(["L0H0->MLP0", "L0H1->MLP0", "MLP0->logits"])
    >>> sets, names = subsets(graph, kept, 8, torch.Generator().manual_seed(0))
    >>> sorted({*names[1:3], *names[5:7]}), names[0], names[3]
    (["L0H0's edges", "L0H1's edges", "MLP0's edges"], 'nothing', '2 edges at random')
    """
    sources = graph.ends[0]
    writers = sources[kept].unique()
    writers = writers[writers > 0]  # without the embedding
    order = writers[torch.randperm(len(writers), generator=draw)].tolist()
    sets, names, singles = torch.zeros(n, len(kept), dtype=torch.bool), ["nothing"], 0
    for i in range(1, n):
        share, kind = float(torch.rand(1, generator=draw)), ("nodes", "node", "node", "edges")[i % 4]
        if kind == "node" and order:
            node, singles = order[singles % len(order)], singles + 1
            sets[i] = kept & (sources == node)
            names.append(f"{graph.source_names[node]}'s edges")
        elif kind == "nodes":
            taken = writers[torch.rand(len(writers), generator=draw) < share]
            sets[i] = kept & torch.isin(sources, taken)
            names.append(f"{len(taken)} nodes at random")
        else:
            sets[i] = kept & (torch.rand(len(kept), generator=draw) < share)
            names.append(f"{int(sets[i].sum())} edges at random")
    return sets, names
