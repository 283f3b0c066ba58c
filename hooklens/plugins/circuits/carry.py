"""A circuit's edges in another model's graph, given a map of its nodes; many maps at once, and random maps."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.graph import CircuitGraph

#: For each node of the source, and last for the logits, its counterpart in the target; -1: none.
Maps = Int[Tensor, "map node"]
_KINDS = ("q", "k", "v", "mlp", "logits")
_SWEEPS = 20  # moves of every head, on average


class Carrier:
    """Carries the edges of one circuit to one target graph.

    A key or value that several heads of the circuit share is carried head by head: in the target these may have
    keys of their own, or share with others. `weight` is each part's share of the circuit's scores.
    """

    def __init__(self, circuit: Circuit, target: CircuitGraph):
        self.source, self.target = circuit.graph, target
        self.edge, self.sender, self.kind, self.reader = _parts(circuit)
        size = circuit.scores.abs().cpu().double()[self.edge]
        size = size / torch.bincount(self.edge).double()[self.edge]
        even = torch.full_like(size, 1 / max(len(size), 1))
        self.weight = size / size.sum() if float(size.sum()) > 0 else even
        self.start, self.columns = _starts(target)
        #: The nodes that edges leave or enter, but embedding and logits.
        ends = torch.cat((self.sender, self.reader)).unique()
        self.nodes = ends[(ends > 0) & (ends < self.source.n_sources)].tolist()
        self.heads = [node for node in self.nodes if self.source.is_head(node)]
        room = target.n_layers * target.n_heads
        if len(self.heads) > room:
            raise InputError(
                f"the circuit has {len(self.heads)} heads, and the target has {room} in all, so that they cannot be "
                "matched one to one; take a smaller circuit"
            )

    def fixed(self) -> Int[Tensor, "node"]:
        """Embedding to embedding, logits to logits, nothing else yet."""
        nodes = torch.full((self.source.n_sources + 1,), -1)
        nodes[0], nodes[-1] = 0, self.target.n_sources
        return nodes

    def edges(self, maps: Maps) -> Int[Tensor, "map part"]:
        """The target's edge for every part; -1 where an end has no counterpart, or its sender writes too late."""
        sender, reader = maps[:, self.sender], maps[:, self.reader]
        exists = (sender >= 0) & (reader >= 0) & (sender < self.columns[reader])
        return torch.where(exists, self.start[self.kind, reader] + sender, -1)

    def masks(self, maps: Maps) -> Bool[Tensor, "map edge"]:
        """The carried circuits."""
        kept = torch.zeros(len(maps), self.target.n_edges + 1, dtype=torch.bool)
        kept.scatter_(1, self.edges(maps) % (self.target.n_edges + 1), True)  # -1 becomes the last column
        return kept[:, :-1]

    def count(self, maps: Maps) -> Int[Tensor, "map"]:
        """How many different edges arrive."""
        edges = self.edges(maps).sort(1).values
        new = torch.ones_like(edges, dtype=torch.bool)
        new[:, 1:] = edges[:, 1:] != edges[:, :-1]
        return (new & (edges >= 0)).sum(1)

    def lost(self, maps: Maps) -> Float[Tensor, "map"]:
        """The share of the circuit, by its scores, that cannot be carried."""
        return (self.edges(maps) < 0).double() @ self.weight

    def scores(self, circuit: Circuit, nodes: Int[Tensor, "node"]) -> Float[Tensor, "edge"]:
        """Every carried edge with the score that it has in the source; the largest where several become one."""
        carried, scores = self.edges(nodes[None])[0], circuit.scores.cpu()
        parts = (carried >= 0).nonzero().flatten()
        out = torch.zeros(self.target.n_edges, dtype=scores.dtype)
        for i in parts[scores[self.edge[parts]].abs().argsort(stable=True)].tolist():
            out[carried[i]] = scores[self.edge[i]]
        return out


def head_nodes(graph: CircuitGraph) -> Int[Tensor, "head"]:
    """The nodes that are heads, layer by layer."""
    return torch.tensor([node for node in range(graph.n_sources) if graph.is_head(node)])


def _parts(circuit: Circuit) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Edge, sender, kind of receiver and reading node of every part of the circuit."""
    graph, edges = circuit.graph, circuit.kept.cpu().nonzero().flatten()
    sources, receivers = (ends[edges].tolist() for ends in graph.ends)
    reading = [graph.receivers[number] for number in receivers]
    used = {*sources, *(receiver.nodes[0] for receiver in reading if receiver.kind == "q")}
    rows = []
    for edge, source, receiver in zip(edges.tolist(), sources, reading, strict=True):
        nodes: Sequence[int] = receiver.nodes
        if receiver.kind in ("k", "v"):
            # if no head of the circuit uses it, it is carried with the first head of its group
            nodes = [node for node in nodes if node in used] or nodes[:1]
        rows += [(edge, source, _KINDS.index(receiver.kind), node) for node in nodes or [graph.n_sources]]
    edge, sender, kind, reader = torch.tensor(rows, dtype=torch.long).view(-1, 4).unbind(1)
    return edge, sender, kind, reader


def _starts(graph: CircuitGraph) -> tuple[Int[Tensor, "kind node"], Int[Tensor, "node"]]:
    """Where the edges into each node begin, by kind of receiver, and how many sources the node can read."""
    start = torch.zeros(len(_KINDS), graph.n_sources + 1, dtype=torch.long)
    columns = torch.zeros(graph.n_sources + 1, dtype=torch.long)
    for receiver in graph.receivers:
        nodes = list(receiver.nodes) or [graph.n_sources]
        start[_KINDS.index(receiver.kind), nodes] = receiver.start
        columns[nodes] = receiver.columns
    return start, columns


# -- random counterparts


def shuffled(carrier: Carrier, nodes: Int[Tensor, "node"], n: int, *, seed: int = 0) -> Maps:
    """`n` maps onto random heads of the same layers: whole groups that share keys are shuffled, and heads in each."""
    graph, draw = carrier.target, seeded(seed)
    shape = n, graph.n_layers, graph.n_kv_heads
    groups = torch.rand(shape, generator=draw).argsort(-1) + graph.n_kv_heads * torch.arange(graph.n_layers)[:, None]
    heads = torch.rand(*shape, graph.group, generator=draw).argsort(-1) + graph.group * groups[..., None]
    return _placed(carrier, nodes, heads.flatten(1)[:, _places(carrier, nodes)])


def random_maps(carrier: Carrier, nodes: Int[Tensor, "node"], n: int, *, seed: int = 0) -> Maps:
    """`n` maps onto random heads anywhere, with as many edges that can exist in the target; MLPs stay.

    Each map is the end of a chain: two heads (or groups that share keys) are exchanged if the number of edges stays the
    same, twenty times a head on average. Every map that such moves reach is equally likely.
    """
    graph, draw = carrier.target, seeded(seed, 1)
    wanted = carrier.count(nodes[None])
    places = _places(carrier, shuffled(carrier, nodes, n, seed=seed))
    row, n_heads = torch.arange(n), graph.n_layers * graph.n_heads
    for step in range(_SWEEPS * len(carrier.heads)):
        here = places[row, torch.randint(places.shape[1], (n,), generator=draw)]
        there = torch.randint(n_heads, (n,), generator=draw)
        size = graph.group if step % 2 else 1
        moved = _exchanged(places, here // size, there // size, size)
        fits = carrier.count(_placed(carrier, nodes, moved)) == wanted
        places = torch.where(fits[:, None], moved, places)
    return _placed(carrier, nodes, places)


def _exchanged(places: Int[Tensor, "map head"], here: Tensor, there: Tensor, size: int) -> Int[Tensor, "map head"]:
    """Exchange two blocks of `size` heads: `here` and `there` are the numbers of the blocks in each map."""
    block, within = places // size, places % size
    to = torch.where(block == here[:, None], there[:, None], torch.where(block == there[:, None], here[:, None], block))
    return to * size + within


def _places(carrier: Carrier, maps: Int[Tensor, "*map node"]) -> Int[Tensor, "*map head"]:
    """The number, among the target's heads, of each head of the circuit."""
    number = torch.full((carrier.target.n_sources,), -1)
    number[head_nodes(carrier.target)] = torch.arange(carrier.target.n_layers * carrier.target.n_heads)
    return number[maps[..., carrier.heads]]


def _placed(carrier: Carrier, nodes: Int[Tensor, "node"], places: Int[Tensor, "map head"]) -> Maps:
    maps = nodes.repeat(len(places), 1)
    maps[:, carrier.heads] = head_nodes(carrier.target)[places]
    return maps
