"""Random circuits of the size and layers of a given one, on whole paths; and sets of its edges to take away."""

import random
from collections import Counter

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.core.arguments import seed_number
from hooklens.core.errors import InputError
from hooklens.plugins.circuits.graph import CircuitGraph

_SWEEPS = 10  # moves of every edge, on average
Subsets = Bool[Tensor, "set edge"]


def random_circuits(
    graph: CircuitGraph, kept: Bool[Tensor, "edge"], n: int = 100, *, seed: int = 0
) -> Bool[Tensor, "draw edge"]:
    """`n` random circuits matched to one in size, layer profile and connectivity.

    Profile: between any two layers each has as many edges of each kind (embedding, head or MLP into q, k, v, MLP or
    logits) as the given one. Connectivity: if every node of the given circuit that is read is also fed, and every node
    that is fed is also read, so it is in each draw; every edge then lies on a path from the embedding to the logits.
    Each draw renames the heads of every layer at random and then moves single edges, ten times each on average, keeping
    all of this.

    >>> graph = CircuitGraph(2, 4, 4)
    >>> kept = graph.mask(["embed->L0H1.v", "L0H1->L1H2.q", "L1H2->logits"])
    >>> [graph.name(int(e)) for e in random_circuits(graph, kept, 1)[0].nonzero()]
    ['embed->L0H1.v', 'L0H1->L1H0.q', 'L1H0->logits']
    """
    if n < 1:
        raise InputError(f"at least one random circuit is drawn, got n={n}")
    sources, receivers = (ends[kept.cpu()].tolist() for ends in graph.ends)
    edges: list[tuple[int, int]] = list(zip(sources, receivers, strict=True))
    if not edges:
        raise InputError("the circuit has no edges, so there is nothing to match; take more edges or a lower threshold")
    chain = _Chain(graph, edges)
    draws = torch.zeros(n, graph.n_edges, dtype=torch.bool)
    for i in range(n):
        draws[i, chain.drawn(random.Random(1_000_003 * seed_number(seed) + i))] = True
    return draws


class _Chain:
    """A set of edges (source, receiver) on its way from the given circuit to a random one."""

    def __init__(self, graph: CircuitGraph, edges: list[tuple[int, int]]):
        self.graph, self.given = graph, edges
        self.readers = [receiver.nodes for receiver in graph.receivers]
        #: Sources that can be exchanged: the heads of one layer.
        self.peers: list[range] = [range(1)]
        for source in range(1, graph.n_sources):
            heads = graph.heads_at(graph.place(source)[0])
            self.peers.append(range(heads.start, heads.stop) if graph.is_head(source) else range(source, source + 1))
        #: Receivers that can be exchanged: those of one kind that read the same sources.
        alike: dict[tuple[str, int], list[int]] = {}
        for number, receiver in enumerate(graph.receivers):
            alike.setdefault((receiver.kind, receiver.columns), []).append(number)
        self.fellows = [alike[receiver.kind, receiver.columns] for receiver in graph.receivers]
        #: Properties of the given circuit that every draw keeps.
        self._set(edges)
        self.fed = all(self.feeds(source) for source, _ in edges)
        self.read = all(self.is_read(receiver) for _, receiver in edges)

    def drawn(self, draw: random.Random) -> list[int]:
        """The edges of one random circuit."""
        self._set(self._renamed(draw))
        self._move(draw, _SWEEPS * len(self.edges))
        return [self.graph.receivers[receiver].start + source for source, receiver in self.edges]

    def _set(self, edges: list[tuple[int, int]]) -> None:
        self.edges, self.known = edges, set(edges)
        self.leaving = Counter(source for source, _ in edges)
        self.entering = Counter(node for _, receiver in edges for node in self.readers[receiver])

    def feeds(self, source: int) -> bool:
        """Does anything enter the node, so that it can pass something on?"""
        return source == 0 or self.entering[source] > 0

    def is_read(self, receiver: int) -> bool:
        """Does any node that reads through the receiver pass something on?"""
        readers = self.readers[receiver]
        return not readers or any(self.leaving[node] > 0 for node in readers)

    def _renamed(self, draw: random.Random) -> list[tuple[int, int]]:
        """The given edges with the heads of every layer shuffled: whole groups that share keys, and heads in each."""
        graph, nodes = self.graph, {}
        for layer in range(graph.n_layers):
            first = graph.heads_at(layer).start
            for g, other in enumerate(draw.sample(range(graph.n_kv_heads), graph.n_kv_heads)):
                for i, j in enumerate(draw.sample(range(graph.group), graph.group)):
                    nodes[first + g * graph.group + i] = first + other * graph.group + j
        receivers = {
            old: new
            for node, other in nodes.items()
            for old, new in zip(graph.receivers_of[node], graph.receivers_of[other], strict=True)
        }
        return [(nodes.get(a, a), receivers.get(b, b)) for a, b in self.given]

    def _move(self, draw: random.Random, n: int) -> None:
        """Try to put a random edge between other ends of the same layers and kinds, `n` times."""
        for _ in range(n):
            i = draw.randrange(len(self.edges))
            old = self.edges[i]
            new = draw.choice(self.peers[old[0]]), draw.choice(self.fellows[old[1]])
            if new in self.known:
                continue
            self._replace(i, new)
            if not self._holds(old, new):
                self._replace(i, old)

    def _replace(self, i: int, new: tuple[int, int]) -> None:
        old, self.edges[i] = self.edges[i], new
        self.known.remove(old)
        self.known.add(new)
        for (source, receiver), amount in ((old, -1), (new, 1)):
            self.leaving[source] += amount
            for node in self.readers[receiver]:
                self.entering[node] += amount

    def _holds(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Is every node still fed if it is read, and read if it is fed? Only the edges' own nodes can have changed."""
        touched = {old[0], new[0], *self.readers[old[1]], *self.readers[new[1]]}
        if self.fed and any(self.leaving[node] > 0 and not self.feeds(node) for node in touched):
            return False
        return not self.read or all(self._all_read(node) for node in touched)

    def _all_read(self, node: int) -> bool:
        """Is everything that enters the node read? A shared key or value may be read by any head of its group."""
        if self.entering[node] <= 0 or self.leaving[node] > 0:
            return True
        receivers = self.graph.receivers_of[node]
        return all(self.is_read(receiver) for _, receiver in self.edges if receiver in receivers)


# -- sets of edges that are taken away


def subsets(
    graph: CircuitGraph, kept: Bool[Tensor, "edge"], n: int, draw: torch.Generator
) -> tuple[Subsets, list[str]]:
    """`n` sets of kept edges and descriptions: nothing; then in turn a node's, another's, some edges, some nodes'.

    The edges of a node are those that leave it; the embedding is not taken. Each random set has a random
    share between none and all. The single nodes are different, as far as there are enough.

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
