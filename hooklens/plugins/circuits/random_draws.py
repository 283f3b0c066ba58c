"""Random circuits that look like a given one: as many edges, between the same layers, on whole paths."""

import random
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.core.arguments import seed_number
from hooklens.core.errors import InputError
from hooklens.plugins.circuits.graph import CircuitGraph

_SWEEPS = 10  # moves of every edge, on average


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
    edges = list(zip(sources, receivers, strict=True))
    if not edges:
        raise InputError("the circuit has no edges, so there is nothing to match; take more edges or a lower threshold")
    layout = _Layout(graph)
    draws = torch.zeros(n, graph.n_edges, dtype=torch.bool)
    for i in range(n):
        draw = _Draw(layout, edges, random.Random(1_000_003 * seed_number(seed) + i))
        draw.rename()
        draw.move(_SWEEPS * len(edges))
        draws[i, draw.numbers()] = True
    return draws


class _Layout:
    """Layers, kinds and numbers of the graph's ends, as plain lists."""

    def __init__(self, graph: CircuitGraph):
        self.graph = graph
        wide = graph.n_heads + graph.mlp
        layers = range(graph.n_layers)
        #: Sources and receivers that may stand for each other, by the one they stand for.
        self.peers: list[Sequence[int]] = [[0]]
        for layer in layers:
            start = graph.sources_before(layer)
            self.peers += [range(start, start + graph.n_heads)] * graph.n_heads
            self.peers += [[start + graph.n_heads]] * graph.mlp
        self.fellows: list[Sequence[int]] = []
        self.start: list[int] = []
        #: The nodes that read through a receiver: one, or the heads that share a key or value.
        self.readers: list[list[int]] = []
        for slot in graph.slots:
            row = len(self.fellows)
            self.start += [slot.start + r * slot.columns for r in range(slot.rows)]
            if slot.kind != "attn":
                self.fellows.append([row])
                self.readers.append([graph.mlp_at(slot.layer)] if slot.kind == "mlp" else [])
                continue
            first = 1 + wide * slot.layer
            for size in (graph.n_heads, graph.n_kv_heads, graph.n_kv_heads):
                self.fellows += [range(row, row + size)] * size
                shared = graph.n_heads // size
                self.readers += [[first + i * shared + j for j in range(shared)] for i in range(size)]
                row += size


class _Draw:
    """A set of edges (source, receiver) on its way to a random one."""

    def __init__(self, layout: _Layout, edges: list[tuple[int, int]], draw: random.Random):
        self.layout, self.draw = layout, draw
        self.edges = list(edges)
        self._count()
        #: What the given circuit has, every draw has.
        self.fed = all(self.feeds(source) for source, _ in edges)
        self.read = all(self.is_read(receiver) for _, receiver in edges)

    def _count(self) -> None:
        self.known = set(self.edges)
        self.leaving = Counter(source for source, _ in self.edges)
        self.entering: Counter[int] = Counter()
        for _, receiver in self.edges:
            self.entering.update(self.layout.readers[receiver])

    def feeds(self, source: int) -> bool:
        """Does anything enter the node, so that it can pass something on?"""
        return source == 0 or self.entering[source] > 0

    def is_read(self, receiver: int) -> bool:
        """Does any node that reads through the receiver pass something on?"""
        readers = self.layout.readers[receiver]
        return not readers or any(self.leaving[node] > 0 for node in readers)

    def rename(self) -> None:
        """Shuffle the heads of every layer: whole groups that share keys and values, and heads within each."""
        graph, nodes, receivers = self.layout.graph, {}, {}
        row = 0
        for layer in range(graph.n_layers):
            groups = self.draw.sample(range(graph.n_kv_heads), graph.n_kv_heads)
            for g, to in enumerate(groups):
                for kind in (0, 1):
                    at = row + graph.n_heads + kind * graph.n_kv_heads
                    receivers[at + g] = at + to
                for i, j in enumerate(self.draw.sample(range(graph.group), graph.group)):
                    head, other = g * graph.group + i, to * graph.group + j
                    nodes[graph.heads_at(layer).start + head] = graph.heads_at(layer).start + other
                    receivers[row + head] = row + other
            row += graph.n_heads + 2 * graph.n_kv_heads + graph.mlp
        self.edges = [(nodes.get(a, a), receivers.get(b, b)) for a, b in self.edges]
        self._count()

    def move(self, n: int) -> None:
        """Try to put a random edge between other ends of the same layers and kinds, `n` times."""
        for _ in range(n):
            i = self.draw.randrange(len(self.edges))
            old = self.edges[i]
            new = self.draw.choice(self.layout.peers[old[0]]), self.draw.choice(self.layout.fellows[old[1]])
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
            for node in self.layout.readers[receiver]:
                self.entering[node] += amount

    def _holds(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Is every node still fed if it is read, and read if it is fed? Only the edges' own nodes can have changed."""
        touched = {old[0], new[0], *self.layout.readers[old[1]], *self.layout.readers[new[1]]}
        if self.fed and any(self.leaving[node] > 0 and not self.feeds(node) for node in touched):
            return False
        return not self.read or all(self._all_read(node) for node in touched)

    def _all_read(self, node: int) -> bool:
        """Is what enters a node read by someone? A shared key or value may be read by any head of its group."""
        if self.entering[node] <= 0 or self.leaving[node] > 0:
            return True
        graph = self.layout.graph
        wide = graph.n_heads + graph.mlp
        layer, head = divmod(node - 1, wide)
        if node == 0 or head >= graph.n_heads:
            return node == 0
        row = layer * (graph.n_heads + 2 * graph.n_kv_heads + graph.mlp)
        own = {row + head}
        shared = {row + graph.n_heads + kind * graph.n_kv_heads + head // graph.group for kind in (0, 1)}
        return all(self.is_read(b) for _, b in self.edges if b in own | shared)

    def numbers(self) -> list[int]:
        return [self.layout.start[receiver] + source for source, receiver in self.edges]
