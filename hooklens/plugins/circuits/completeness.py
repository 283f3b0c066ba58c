"""Completeness: do circuit and model still agree when the same edges are removed from both?"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.plugins.circuits.faithfulness import Faithfulness, tied_p
from hooklens.plugins.circuits.random_draws import Subsets, subsets
from hooklens.plugins.circuits.run import Bench, chunks
from hooklens.results.result import Result, Table

_OWN, _OTHERS = 40, 10  # sets K of the circuit, and of each random one
_STEPS, _WIDTH = 5, 10  # steps of the greedy K, and edges tried in each
_MASKS = 20_000_000  # numbers of masks at once


@dataclass(frozen=True, eq=False)
class Completeness(Result):
    """|m(C without K) - m(M without K)| for sets K of the circuit's edges, as shares of m(M) - m(empty).

    `random` has the gaps of sets drawn at random (`subsets`: edges, single nodes, several nodes), and `kinds` describes
    each set. `greedy` grows one K by the edge with the largest gap: a search for the worst case, not an estimate of a
    typical one. `null` is the largest gap of each random circuit over as many K as the first `n_compared` of `random`.

    `complement` is the share of the metric that all edges outside the circuit keep: 0 for a complete circuit.
    `complement_low` and `complement_high` are its 95 % interval, and `complement_null` has that of random circuits.
    """

    random: Float[Tensor, "set"]
    sizes: Int[Tensor, "set"]
    kinds: list[str]
    greedy: Float[Tensor, "step"]
    greedy_edges: list[str]
    null: Float[Tensor, "draw"]
    n_compared: int
    complement: float
    complement_low: float
    complement_high: float
    complement_null: Float[Tensor, "draw"]
    replacement: str

    @property
    def worst(self) -> float:
        """The maximum over random and greedy K: 0 for a complete circuit."""
        return float(torch.cat((self.random, self.greedy)).max())

    @property
    def p(self) -> float:
        """How often the gap of a random circuit is as small, both over equally many random K."""
        return float(tied_p(-self.random[: self.n_compared].max(), -self.null))

    @property
    def complement_p(self) -> float:
        """How often the complement of a random circuit keeps as little, whatever the sign."""
        own = torch.tensor(abs(self.complement), dtype=self.complement_null.dtype)
        return float(tied_p(-own, -self.complement_null.abs()))

    def table(self, n: int | None = None) -> Table:
        """One row a set K: its number of edges, and the gap between circuit and model without it."""
        measured = zip(self.kinds, self.sizes, self.random, strict=True)
        rows = [(kind, int(size), float(gap)) for kind, size, gap in measured]
        rows += [("greedy", i + 1, float(gap)) for i, gap in enumerate(self.greedy)]
        return Table(("K", "edges in K", "parts by (share)"), sorted(rows, key=lambda row: -row[2])).head(n)

    def figure(self) -> Any:
        """The gap between circuit and model, by the size of K."""
        from hooklens.viz.curves import scatter

        sizes = torch.cat((self.sizes, torch.arange(1, len(self.greedy) + 1)))
        names = [*self.kinds, *(f"greedy, with {name}" for name in self.greedy_edges)]
        gaps = torch.cat((self.random, self.greedy))
        title = f"Completeness: at most {self.worst:.2f} apart ({self.replacement} ablation)"
        return scatter(sizes, gaps, names, title, x_title="edges in K", y_title="|m(C - K) - m(M - K)|, share")


def completeness_of(bench: Bench, faithful: Faithfulness, null: Subsets, draw: torch.Generator) -> Completeness:
    """The gaps between circuit and model over random K and a greedy one, and those of random circuits over random K.

    The complement's share is the completeness of Marks et al. (2024), "Sparse Feature Circuits", section 4, over edges.
    """
    kept, unit = faithful.circuit.kept.cpu(), faithful.unit
    sets, kinds = subsets(bench.graph, kept, _OWN, draw)
    gaps = _gaps(bench, kept, sets) / unit
    greedy, edges = _greedy(bench, kept, draw)
    worst = []
    for some in chunks(len(null), max(1, _MASKS // (2 * _OTHERS * len(kept)))):
        without = torch.cat([subsets(bench.graph, mask, _OTHERS, draw)[0] for mask in null[some]])
        random_gaps = _gaps(bench, null[some].repeat_interleave(_OTHERS, 0), without)
        worst.append(random_gaps.view(-1, _OTHERS).amax(1))
    others = bench.run(torch.cat((~kept[None], ~null))).per_pair
    shares, (low, high) = faithful.share(others), faithful.interval_of(others[0])
    return Completeness(
        random=gaps,
        sizes=sets.sum(1),
        kinds=kinds,
        greedy=greedy / unit,
        greedy_edges=[bench.graph.name(e) for e in edges],
        null=torch.cat(worst) / unit,
        n_compared=_OTHERS,
        complement=float(shares[0]),
        complement_low=low,
        complement_high=high,
        complement_null=shares[1:],
        replacement=str(bench.replacement),
    )


def _gaps(bench: Bench, kept: Bool[Tensor, "*set edge"], sets: Subsets) -> Float[Tensor, "set"]:
    """|m(C - K) - m(M - K)| of every K."""
    runs = bench.run(torch.cat((kept & ~sets, ~sets))).per_pair.mean(1)
    return (runs[: len(sets)] - runs[len(sets) :]).abs()


def _greedy(bench: Bench, kept: Bool[Tensor, "edge"], draw: torch.Generator) -> tuple[Float[Tensor, "step"], list[int]]:
    """Grow K by the edge, of some drawn at random, that makes the gap largest."""
    taken, largest = torch.zeros_like(kept), []
    edges: list[int] = []
    for _ in range(min(_STEPS, int(kept.sum()))):
        left = (kept & ~taken).nonzero().flatten()
        tried = left[torch.randperm(len(left), generator=draw)[:_WIDTH]]
        sets = taken.repeat(len(tried), 1)
        sets[torch.arange(len(tried)), tried] = True
        gaps = _gaps(bench, kept, sets)
        best = int(gaps.argmax())
        taken, edges = sets[best], [*edges, int(tried[best])]
        largest.append(gaps[best])
    return torch.stack(largest), edges
