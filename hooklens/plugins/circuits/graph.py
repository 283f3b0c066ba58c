"""The graph of a model: the nodes that write into the residual stream, and the receivers that read each of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.component import Component, head_name, layer_names
from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.results.result import Result, Table

_MOST_OF_A_KIND = 10_000
_MOST_EDGES = 1 << 25
_KINDS = {"q": "q", "k": "k and v", "v": "k and v", "mlp": "MLP", "logits": "logits"}
Mask = Bool[Tensor, "mask edge"]
Edges = str | Iterable[str] | Iterable[int] | Bool[Tensor, "edge"] | Int[Tensor, "chosen"]


class Slot(NamedTuple):
    """One group of receivers of the flat edge vector: `rows` receivers that each read the first `columns` sources."""

    kind: str  # "attn" (rows: queries, keys, values), "mlp" or "logits"
    layer: int
    start: int
    rows: int
    columns: int


class Receiver(NamedTuple):
    """One reader of the stream. Its edges are numbered from `start` on, one for each of the first `columns` sources.

    `nodes` read through it: one head or MLP, all heads that share a key or value, or none (the logits).
    """

    name: str
    kind: str  # "q", "k", "v", "mlp" or "logits"
    start: int
    columns: int
    nodes: range


@dataclass(frozen=True, eq=False)
class CircuitGraph(Result):
    """Nodes: the embedding, every head, every MLP, the logits. Edges end in a head's q, k or v, an MLP or the logits.

    With fewer key and value heads than heads, k and v edges belong to the key/value head (`L3G0.k`): the heads of its
    group have no keys of their own. Names are those of path patching. Edges are numbered receiver by receiver, sources
    in the order of the forward pass.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp: bool = True
    parallel: bool = False
    shared_scale: bool = False

    def __post_init__(self) -> None:
        sizes = (self.n_layers, self.n_heads, self.n_kv_heads)
        if not all(type(size) is int and 1 <= size <= _MOST_OF_A_KIND for size in sizes) or self.n_heads % sizes[2]:
            raise InputError(
                f"a graph of {sizes[0]!r:.20} layers, {sizes[1]!r:.20} heads and {sizes[2]!r:.20} key/value heads was "
                f"asked for; each is a whole number up to {_MOST_OF_A_KIND:,}, the second a multiple of the third"
            )
        if self.n_edges > _MOST_EDGES:  # every circuit of the graph has a score an edge
            raise InputError(f"a graph of {self.n_edges:,} edges was asked for; at most {_MOST_EDGES:,} can be held")

    @property
    def shape(self) -> tuple[int, int, int, bool, bool]:
        """What two models must share for their edges to be the same."""
        return self.n_layers, self.n_heads, self.n_kv_heads, self.mlp, self.parallel

    @property
    def group(self) -> int:
        """How many heads share one key/value head."""
        return self.n_heads // self.n_kv_heads

    def sources_before(self, layer: int) -> int:
        """The number of nodes that write before that layer's attention reads."""
        return 1 + (self.n_heads + self.mlp) * layer

    def heads_at(self, layer: int) -> slice:
        """The sources that are that layer's heads."""
        start = self.sources_before(layer)
        return slice(start, start + self.n_heads)

    def mlp_at(self, layer: int) -> int:
        """The source that is that layer's MLP."""
        return self.sources_before(layer) + self.n_heads

    def place(self, source: int) -> tuple[int, int]:
        """The layer of a node other than the embedding, and its number there: heads first, then the MLP."""
        return divmod(source - 1, self.n_heads + self.mlp)

    def is_head(self, source: int) -> bool:
        return source > 0 and self.place(source)[1] < self.n_heads

    @property
    def n_sources(self) -> int:
        return self.sources_before(self.n_layers)

    @cached_property
    def slots(self) -> list[Slot]:
        """Where each group of receivers has its edges."""
        slots, start = [], 0
        for layer in range(self.n_layers):
            rows, columns = self.n_heads + 2 * self.n_kv_heads, self.sources_before(layer)
            slots.append(Slot("attn", layer, start, rows, columns))
            start += rows * columns
            if self.mlp:
                columns += 0 if self.parallel else self.n_heads
                slots.append(Slot("mlp", layer, start, 1, columns))
                start += columns
        return [*slots, Slot("logits", self.n_layers, start, 1, self.n_sources)]

    @cached_property
    def receivers(self) -> list[Receiver]:
        """Every reader in the order of the forward pass; in a layer queries, keys, values, then the MLP."""
        receivers = []
        for slot in self.slots:
            for row, (name, kind, nodes) in enumerate(self._rows(slot)):
                start = slot.start + row * slot.columns
                receivers.append(Receiver(name, kind, start, slot.columns, nodes))
        return receivers

    def _rows(self, slot: Slot) -> list[tuple[str, str, range]]:
        """Name, kind and nodes of each receiver of a slot."""
        if slot.kind == "logits":
            return [("logits", "logits", range(0))]
        if slot.kind == "mlp":
            at = self.mlp_at(slot.layer)
            return [(Component("mlp", slot.layer).name, "mlp", range(at, at + 1))]
        first, rows = self.heads_at(slot.layer).start, []
        for kind, size in (("q", 1), ("k", self.group), ("v", self.group)):
            for number in range(self.n_heads // size):
                name = Component(kind, slot.layer, number, keyed=size > 1).name
                start = first + number * size
                rows.append((name, kind, range(start, start + size)))
        return rows

    @cached_property
    def receivers_of(self) -> list[list[int]]:
        """The numbers of the receivers of each node: q, k and v of a head, or an MLP's own."""
        numbers: list[list[int]] = [[] for _ in range(self.n_sources)]
        for number, receiver in enumerate(self.receivers):
            for node in receiver.nodes:
                numbers[node].append(number)
        return numbers

    @property
    def n_edges(self) -> int:
        return self.slots[-1].start + self.slots[-1].columns

    def block(self, edges: Tensor, slot: Slot) -> Tensor:
        """The part of an edge tensor `[... edge]` that belongs to a slot, as `[... receiver source]`."""
        return edges[..., slot.start : slot.start + slot.rows * slot.columns].unflatten(-1, (slot.rows, slot.columns))

    @cached_property
    def key_heads(self) -> dict[str, range]:
        """The key/value heads that several heads share, each with these heads."""
        if self.group == 1:
            return {}
        return {name.partition(".")[0]: nodes for name, kind, *_, nodes in self.receivers if kind == "k"}

    # -- names

    @cached_property
    def source_names(self) -> list[str]:
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [head_name(layer, head) for head in range(self.n_heads)]
            names += [Component("mlp", layer).name] if self.mlp else []
        return names

    @cached_property
    def receiver_names(self) -> list[str]:
        return [receiver.name for receiver in self.receivers]

    @cached_property
    def ends(self) -> tuple[Int[Tensor, "edge"], Int[Tensor, "edge"]]:
        """The source and the receiver of every edge."""
        columns = [receiver.columns for receiver in self.receivers]
        sources = torch.cat([torch.arange(n) for n in columns])
        return sources, torch.arange(len(columns)).repeat_interleave(torch.tensor(columns))

    def name(self, edge: int) -> str:
        """The name of an edge.

        >>> CircuitGraph(2, 4, 2).name(0)
        'embed->L0H0.q'
        """
        sources, receivers = self.ends
        return f"{self.source_names[int(sources[edge])]}->{self.receiver_names[int(receivers[edge])]}"

    def numbers(self, names: str | Iterable[str]) -> list[int]:
        """The edges of these names; an unknown one raises with the nearest.

        >>> graph = CircuitGraph(2, 2, 2)
        >>> [graph.name(e) for e in graph.numbers(["L0H1->L1H0.q", "MLP1->logits"])]
        ['L0H1->L1H0.q', 'MLP1->logits']
        """
        sources = {name: i for i, name in enumerate(self.source_names)}
        receivers = {receiver.name: receiver for receiver in self.receivers}
        numbers = []
        for name in [names] if isinstance(names, str) else names:
            source, arrow, to = name.partition("->")
            if not arrow:
                raise InputError(f"an edge is written source->receiver, such as {self.name(0)!r}; got {name!r}")
            if source not in sources:
                raise did_you_mean("source", source, sources)
            if to not in receivers:
                raise did_you_mean("receiver", to, receivers)
            if sources[source] >= receivers[to].columns:
                raise InputError(f"{to} reads before {source} writes, so there is no edge {name!r}")
            numbers.append(receivers[to].start + sources[source])
        return numbers

    # -- paths

    def live(self, kept: Mask) -> Bool[Tensor, "mask source"]:
        """Which nodes a path of kept edges reaches from the embedding.

        Heads behind which a norm stands also reach each other: it scales their sum.
        """
        live = torch.zeros(len(kept), self.n_sources, dtype=torch.bool, device=kept.device)
        live[:, 0] = True
        for slot in self.slots[:-1]:
            reached = (self.block(kept, slot) & live[:, None, : slot.columns]).any(-1)
            if slot.kind == "mlp":
                live[:, self.mlp_at(slot.layer)] = reached[:, 0]
                continue
            q, k, v = reached.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
            heads = q | (k | v).repeat_interleave(self.group, 1)
            live[:, self.heads_at(slot.layer)] = heads.any(-1, keepdim=True) if self.shared_scale else heads
        return live

    def useful(self, kept: Mask) -> Bool[Tensor, "mask source"]:
        """From which nodes a path of kept edges, or the norm that a layer's heads share, leads to the logits."""
        useful = self.block(kept, self.slots[-1])[:, 0].clone()
        for slot in self.slots[-2::-1]:
            if slot.kind == "attn" and self.shared_scale:
                heads = self.heads_at(slot.layer)
                useful[:, heads] = useful[:, heads].any(-1, keepdim=True)
            leads = self.block(kept, slot) & self._reads(slot, useful)[..., None]
            useful[:, : slot.columns] |= leads.any(1)
        return useful

    def on_a_path(self, kept: Mask, *, rooted: bool = True) -> Mask:
        """The kept edges that lie on a path from the embedding to the logits (not `rooted`: on one to the logits)."""
        useful = self.useful(kept)
        live = self.live(kept) if rooted else torch.ones_like(useful)
        return kept & self._between(live, useful)

    def of_nodes(self, nodes: Bool[Tensor, "mask source"]) -> Mask:
        """Edge masks that keep whole nodes: every edge that leaves a kept node and ends in one (or in the logits)."""
        return self._between(nodes, nodes)

    def _between(self, sources: Bool[Tensor, "mask source"], readers: Bool[Tensor, "mask source"]) -> Mask:
        """Every edge that leaves one of `sources` and ends in one of `readers` or in the logits."""
        parts = []
        for slot in self.slots:
            edges = sources[:, None, : slot.columns].expand(-1, slot.rows, -1)
            if slot.kind != "logits":
                edges = edges & self._reads(slot, readers)[..., None]
            parts.append(edges.flatten(1))
        return torch.cat(parts, 1)

    def _reads(self, slot: Slot, nodes: Bool[Tensor, "mask source"]) -> Tensor:
        """Which of a slot's receivers belong to one of these nodes."""
        if slot.kind == "mlp":
            return nodes[:, self.mlp_at(slot.layer), None]
        heads = nodes[:, self.heads_at(slot.layer)]
        keyed = heads.unflatten(1, (self.n_kv_heads, self.group)).any(-1)
        return torch.cat((heads, keyed, keyed), 1)

    # -- masks

    def mask(self, edges: Edges) -> Bool[Tensor, "edge"]:
        """A mask that keeps these edges: by name, by number, or by True and False for every edge.

        >>> graph = CircuitGraph(1, 1, 1)
        >>> kept = graph.mask(["MLP0->logits"])
        >>> torch.equal(graph.mask(kept), kept), torch.equal(graph.mask([graph.n_edges - 1]), kept)
        (True, True)
        """
        chosen = self._listed(edges)
        if chosen and all(isinstance(edge, bool) for edge in chosen):
            if len(chosen) != self.n_edges:
                raise InputError(
                    f"a mask has True or False for each of this graph's {self.n_edges} edges, got {len(chosen)} values"
                )
            return torch.tensor(chosen)
        wrong = [e for e in chosen if isinstance(e, bool) or not isinstance(e, str | Integral)]
        if wrong:
            raise WrongType(f"{self._what_edges_are()}; got {wrong[0]!r:.80}")
        numbers = self.numbers(e for e in chosen if isinstance(e, str)) + [e for e in chosen if not isinstance(e, str)]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.n_edges:
            raise InputError(f"this graph has the edges 0 to {self.n_edges - 1}, got {min(numbers)} to {max(numbers)}")
        kept = torch.zeros(self.n_edges, dtype=torch.bool)
        kept[torch.tensor(numbers, dtype=torch.long)] = True
        return kept

    def _listed(self, edges: Any) -> list[Any]:
        """The given edges as a list of Python values."""
        if isinstance(edges, str):
            return [edges]
        try:
            return [_plain(edge) for edge in _plain(edges)]
        except TypeError as error:
            raise WrongType(f"{self._what_edges_are()}; got {edges!r:.80}") from error

    def _what_edges_are(self) -> str:
        return (
            f"edges are a list of names such as {self.name(0)!r}, a list of numbers from 0 to {self.n_edges - 1}, or a "
            "mask with True or False for every edge, such as circuit.kept"
        )

    def table(self, n: int | None = None) -> Table:
        """The number of edges into each kind of receiver."""
        counts = dict.fromkeys(_KINDS.values(), 0)
        for receiver in self.receivers:
            counts[_KINDS[receiver.kind]] += receiver.columns
        rows = [(kind, count) for kind, count in counts.items() if count]
        return Table(("edges into", "count"), [*rows, ("all", self.n_edges)]).head(n)

    def heatmap(self, values: Float[Tensor, "source"], title: str, colourbar: str) -> Any:
        """The figure of a value for every node but the embedding, layer by layer."""
        from hooklens.viz.figures import heatmap

        columns = [*(f"H{head}" for head in range(self.n_heads)), *(["MLP"] if self.mlp else [])]
        nodes, rows = values[1:].view(self.n_layers, len(columns)), layer_names(self.n_layers)
        return heatmap(nodes, x=columns, y=rows, title=title, y_title="layer", colourbar=colourbar)


def _plain(value: Any) -> Any:
    """A tensor or NumPy value as Python numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def circuit_graph(model: HookedTransformer) -> CircuitGraph:
    """Every node and edge of a model: what writes into the residual stream, and what reads it.

    >>> from hooklens.testing import tiny_model
    >>> graph = circuit_graph(tiny_model(n_layers=1, n_heads=4))
    >>> graph.n_edges, graph.name(22)
    (23, 'MLP0->logits')

    In parallel blocks a layer's MLP does not read its heads. With a norm behind attention (sandwich blocks), the output
    of a head is its share of `attn_out`: its result, scaled by the norm of the whole sum (biases of W_O in equal
    parts). The heads of a layer share that scale, which is not an edge.

    Reference: Conmy et al. (2023), "Towards Automated Circuit Discovery", section 2 and appendix.
    """
    need_hooked(model, "a graph of edges")
    cfg, block = model.cfg, model.blocks[0]
    block.need_sum("a graph of edges")
    block.need_steps("a graph of edges")
    return CircuitGraph(
        cfg.n_layers,
        cfg.n_heads,
        cfg.n_key_value_heads,
        mlp=not cfg.attn_only,
        parallel=not block.mlp_reads_attn,
        shared_scale=bool(block.writes_through("attn").scales),
    )
