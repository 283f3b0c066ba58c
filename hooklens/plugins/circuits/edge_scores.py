"""Scores of edges, and the circuits that are cut from them."""

import heapq
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import real, whole
from hooklens.core.errors import ArgumentError, WrongType
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.graph import CircuitGraph
from hooklens.results.result import Result, Table
from hooklens.sweeps.replacement import Replacement


@dataclass(frozen=True, eq=False)
class EdgeScores(Result):
    """How much each edge carries, by one method, as the mean over pairs; positive: it raises the metric.

    `std_error` is that of the mean over pairs. `found_on` holds a digest of every prompt pair that was used, so that an
    evaluation can say whether its prompts are new.
    """

    ranked_by = "score"

    graph: CircuitGraph
    scores: Float[Tensor, "edge"]
    std_error: Float[Tensor, "edge"]
    base: float
    empty: float
    n_pairs: int
    method: str
    replacement: Replacement
    model_name: str
    found_on: list[str]

    @property
    def node_scores(self) -> Float[Tensor, "source"]:
        """The score of each whole node: the sum over the edges that leave it, as gradients are linear."""
        sources = self.graph.ends[0].to(self.scores.device)
        return self.scores.new_zeros(self.graph.n_sources).index_add_(0, sources, self.scores)

    def order(self) -> list[int]:
        """Every edge, the largest score first, whatever its sign."""
        return self.scores.abs().argsort(descending=True, stable=True).tolist()

    # -- circuits

    def top_edges(self, n: int) -> Circuit:
        """The edges of the largest scores, as many as leave at most `n` on paths from the embedding to the logits."""
        n = _at_most(n, self.graph.n_edges, "edges")
        return self._largest(self.order(), n, f"at most {n} of the top edges")

    def above(self, threshold: float) -> Circuit:
        """Every edge whose score, whatever its sign, reaches the threshold, and that lies on a path of such edges."""
        threshold = real("threshold", threshold)
        return self._circuit(self.scores.abs() >= threshold, f"edges of at least {threshold:g}")

    def greedy_edges(self, n: int) -> Circuit:
        """At most `n` edges, grown from the logits: always the largest score among edges into nodes that are in.

        So every edge leads to the logits; edges that no path from the embedding reaches are dropped at the end.

        Reference: Hanna et al. (2024), "Have Faith in Faithfulness", section 3 (greedy search; there n edges are taken
        before dead ends are dropped).
        """
        n = _at_most(n, self.graph.n_edges, "edges")
        return self._largest(_grown(self.graph, self.scores), n, f"at most {n} edges grown from the logits")

    def top_nodes(self, n: int) -> Circuit:
        """The `n` nodes of the largest scores with every edge between them, from the embedding and to the logits."""
        scores = self.node_scores.abs()
        scores[0] = -1
        n = _at_most(n, len(scores) - 1, "nodes beside the embedding")
        nodes = torch.zeros(1, len(scores), dtype=torch.bool)
        nodes[0, scores.argsort(descending=True, stable=True)[:n].cpu()] = True
        nodes[0, 0] = True
        return self._circuit(self.graph.of_nodes(nodes)[0], f"top {n} nodes")

    def _largest(self, order: list[int], n: int, how: str) -> Circuit:
        """As many of the first edges as leave at most n on paths: more of them never leave fewer."""
        counts = range(n, self.graph.n_edges + 1)
        fits = bisect_right(counts, n, key=lambda count: int(self._tidy(self.graph.mask(order[:count])).sum()))
        return self._circuit(self.graph.mask(order[: counts[fits - 1]]), how)

    def _tidy(self, kept: Tensor) -> Tensor:
        return self.graph.on_a_path(kept[None].cpu(), rooted=self.replacement.from_runs)[0]

    def _circuit(self, kept: Tensor, how: str) -> Circuit:
        tidy = self._tidy(kept)
        return Circuit(
            graph=self.graph,
            kept=tidy,
            scores=torch.where(tidy, self.scores.cpu(), 0.0),
            method=f"{self.method}, {how}",
            replacement=self.replacement,
            model_name=self.model_name,
            dropped=int(kept.sum()) - int(tidy.sum()),
            found_on=self.found_on,
        )

    # -- reading

    def table(self, n: int | None = 20) -> Table:
        """Edges by score, whatever its sign."""
        rows = [(self.graph.name(e), float(self.scores[e]), float(self.std_error[e])) for e in self.order()[:n]]
        return Table(("edge", self.method, "standard error"), rows)

    def figure(self) -> Any:
        """The score of each node, layer by layer: the sum over the edges that leave it."""
        title = f"{self.method}: score of each node ({self.replacement} ablation), the sum over its edges"
        return self.graph.heatmap(self.node_scores, title, "score")


def need_scores(scores: Any, asker: str) -> None:
    """Raise for anything except EdgeScores."""
    if not isinstance(scores, EdgeScores):
        raise WrongType(
            f"{asker} needs the EdgeScores of a model, got {type(scores).__name__}; eap(...) or eap_ig(...) makes "
            "them, and measure_faithfulness measures a single circuit"
        )


def _at_most(n: Any, total: int, what: str) -> int:
    """The number n of edges or nodes to choose, from 1 to all of them."""
    n = whole("n", n, 1)
    if n > total:
        raise ArgumentError("{n} is at most {0}: this model has {0} {1}; got {2}", total, what, n)
    return n


def _grown(graph: CircuitGraph, scores: Float[Tensor, "edge"]) -> list[int]:
    """Every edge in the order in which a circuit grows: a queue, by score, of the edges into nodes that are in."""
    size, sources, receivers = scores.abs().tolist(), graph.ends[0].tolist(), graph.receivers
    queue: list[tuple[float, int]] = []
    order: list[int] = []
    entered: set[int] = set()

    def enter(number: int) -> None:
        if number not in entered:
            entered.add(number)
            start = receivers[number].start
            for edge in range(start, start + receivers[number].columns):
                heapq.heappush(queue, (-size[edge], edge))

    enter(len(receivers) - 1)
    while queue:
        order.append(heapq.heappop(queue)[1])
        for number in graph.receivers_of[sources[order[-1]]]:
            enter(number)
    return order
