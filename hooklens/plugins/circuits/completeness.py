"""Completeness: does the circuit part from the model when the same edges are taken from both?"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.measure import tied_p
from hooklens.plugins.circuits.run import Bench, chunks
from hooklens.result import Result, Table

_RANDOM, _STEPS, _WIDTH = 10, 5, 10  # random K; steps of the greedy one, and edges tried in each
_MASKS = 20_000_000  # numbers of masks at once
Sets = Bool[Tensor, "set edge"]


@dataclass(frozen=True, eq=False)
class Completeness(Result):
    """|m(C without K) - m(M without K)| for sets K of the circuit's edges, as shares of m(M) - m(empty).

    `greedy` grows one K edge by edge where the two part most, so it is a search for the worst case and its value is no
    estimate of a typical one. `null` is the largest over as many random K of each random circuit: compare it with
    `random.max()`.
    """

    random: Float[Tensor, "set"]
    sizes: Int[Tensor, "set"]
    greedy: Float[Tensor, "step"]
    greedy_edges: list[str]
    null: Float[Tensor, "draw"]
    ablation: str

    @property
    def worst(self) -> float:
        """The maximum over random and greedy K: 0 for a complete circuit."""
        return float(torch.cat((self.random, self.greedy)).max())

    @property
    def p(self) -> float:
        """How often a random circuit parts from the model by no more, both over random K."""
        return float(tied_p(-self.random.max(), -self.null))

    def table(self, n: int | None = None) -> Table:
        """Every K: how many edges it takes away, and how far circuit and model then part."""
        rows = [("random", int(size), float(gap)) for size, gap in zip(self.sizes, self.random, strict=True)]
        rows += [("greedy", i + 1, float(gap)) for i, gap in enumerate(self.greedy)]
        return Table(("K", "edges in K", "parts by (share)"), sorted(rows, key=lambda row: -row[2])).head(n)

    def figure(self) -> Any:
        """How far circuit and model part, by the size of K."""
        from hooklens.viz.curves import scatter

        sizes = torch.cat((self.sizes, torch.arange(1, len(self.greedy) + 1)))
        names = [*["random K"] * len(self.sizes), *(f"greedy, with {name}" for name in self.greedy_edges)]
        gaps = torch.cat((self.random, self.greedy))
        title = f"Completeness: at most {self.worst:.2f} apart ({self.ablation} ablation)"
        return scatter(sizes, gaps, names, title, x_title="edges in K", y_title="|m(C - K) - m(M - K)|, share")


def completeness_of(
    bench: Bench, circuit: Circuit, null: Sets, unit: Float[Tensor, ""], draw: torch.Generator
) -> Completeness:
    """How far circuit and model part over random K and a greedy one, and how far random circuits do over random K."""
    kept = circuit.kept.cpu()
    sets = _random_subsets(kept, _RANDOM, draw)
    gaps = _gaps(bench, kept, sets) / unit
    greedy, edges = _greedy(bench, kept, draw)
    names = [bench.graph.name(e) for e in edges]
    each = []
    for some in chunks(len(null), max(1, _MASKS // (2 * _RANDOM * len(kept)))):
        one = null[some].repeat_interleave(_RANDOM, 0)
        without = torch.cat([_random_subsets(mask, _RANDOM, draw) for mask in null[some]])
        each.append(_gaps(bench, one, without).view(-1, _RANDOM).amax(1))
    return Completeness(gaps, sets.sum(1), greedy / unit, names, torch.cat(each) / unit, bench.ablation)


def _random_subsets(kept: Bool[Tensor, "edge"], n: int, draw: torch.Generator) -> Sets:
    """Random sets of kept edges, from none to nearly all; the first is empty."""
    shares = torch.linspace(0, 1, n + 1)[:n, None]
    return kept & (torch.rand(n, len(kept), generator=draw) < shares)


def _gaps(bench: Bench, kept: Bool[Tensor, "*set edge"], sets: Sets) -> Float[Tensor, "set"]:
    """|m(C - K) - m(M - K)| of every K."""
    runs = bench.run(torch.cat((kept & ~sets, ~sets))).per_pair.mean(1).cpu()
    return (runs[: len(sets)] - runs[len(sets) :]).abs()


def _greedy(bench: Bench, kept: Bool[Tensor, "edge"], draw: torch.Generator) -> tuple[Float[Tensor, "step"], list[int]]:
    """Grow K by the edge, of some drawn at random, with which circuit and model part most."""
    taken, found = torch.zeros_like(kept), []
    edges: list[int] = []
    for _ in range(min(_STEPS, int(kept.sum()))):
        left = (kept & ~taken).nonzero().flatten()
        tried = left[torch.randperm(len(left), generator=draw)[:_WIDTH]]
        sets = taken.repeat(len(tried), 1)
        sets[torch.arange(len(tried)), tried] = True
        gaps = _gaps(bench, kept, sets)
        best = int(gaps.argmax())
        taken, edges = sets[best], [*edges, int(tried[best])]
        found.append(gaps[best])
    return torch.stack(found), edges
