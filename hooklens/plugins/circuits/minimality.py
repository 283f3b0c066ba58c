"""Minimality: is each edge of the circuit worth something in it, and more than an edge of a random circuit?"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.measure import Faithfulness, slack
from hooklens.plugins.circuits.run import Bench, chunks
from hooklens.result import Result, Table
from hooklens.statistics import mean_interval, q_values

_CUT = 10  # edges of each random circuit that are cut, one at a time
_MASKS = 20_000_000  # numbers of masks at once
Sets = Bool[Tensor, "set edge"]


@dataclass(frozen=True, eq=False)
class Minimality(Result):
    """What each edge of the circuit is worth: m(C) - m(C without it), as a share of m(M) - m(empty), per edge.

    `null` is the same, whatever its sign, of random edges of each random circuit; `q` are Benjamini-Hochberg values
    over the circuit's edges of being worth more than those.
    """

    edges: list[str]
    effect: Float[Tensor, "edge"]
    low: Float[Tensor, "edge"]
    high: Float[Tensor, "edge"]
    null: Float[Tensor, "draw cut"]
    ablation: str

    @property
    def p(self) -> Float[Tensor, "edge"]:
        """How often a random edge is worth as much, over the random circuits and this one, each of equal weight.

        If this circuit were one more random one, the rank of a random edge of it among all of them would be any. Edges
        of one circuit are no independent draws, so that many of them make no p smaller than the circuits allow.
        """
        size = self.effect.abs()
        least = size - slack(self.null)
        reached = torch.stack([(self.null >= one).double().mean(1).sum() for one in least])
        own = (size >= least[:, None]).double().mean(1)
        return torch.where(size.isnan(), torch.nan, (reached + own) / (len(self.null) + 1))

    @property
    def q(self) -> Float[Tensor, "edge"]:
        return q_values(self.p)

    @property
    def least_q(self) -> float:
        """The smallest q there is, for however many edges: of those that no random circuit's edge reaches."""
        return 1 / (len(self.null) + 1)

    @property
    def idle(self) -> list[str] | None:
        """Edges whose interval includes 0: the circuit may do without them. None where there are no intervals."""
        if not bool((self.low.isfinite() & self.high.isfinite()).all()):
            return None
        return [name for name, a, b in zip(self.edges, self.low, self.high, strict=True) if a <= 0 <= b]

    def top(self, k: int = 10) -> Table:
        """The `k` edges that are worth most."""
        return self.table(k)

    def table(self, n: int | None = 20) -> Table:
        """One row an edge."""
        order = self.effect.abs().argsort(descending=True, stable=True).tolist()
        columns = (self.effect, self.low, self.high, self.q)
        rows = [(self.edges[i], *(float(column[i]) for column in columns)) for i in order[:n]]
        return Table(("edge", "worth (share)", "95% low", "95% high", "q"), rows)

    def figure(self) -> Any:
        """The edges that are worth most, with their intervals."""
        from hooklens.viz.figures import bars

        order = self.effect.abs().argsort(descending=True, stable=True)[:40].tolist()
        known = bool(self.low.isfinite().all())
        low, high = (self.low[order], self.high[order]) if known else (None, None)
        title = f"Minimality: what each edge is worth ({self.ablation} ablation)"
        names = [self.edges[i] for i in order]
        return bars(self.effect[order], low, high, names, title, y_title="share of the difference")


def minimality_of(
    bench: Bench, circuit: Circuit, null: Sets, faithful: Faithfulness, unit: Tensor, draw: torch.Generator
) -> Minimality:
    """What every edge of the circuit is worth in it, and some random edges of each random circuit in theirs."""
    kept = circuit.kept.cpu()
    edges = kept.nonzero().flatten()
    without = kept.repeat(len(edges), 1)
    without[torch.arange(len(edges)), edges] = False
    lost = (faithful.per_pair - bench.run(without).per_pair).T / unit  # pair edge
    low, high = mean_interval(lost, group=faithful.group)
    parts = chunks(len(null), max(1, _MASKS // (_CUT * len(kept))))
    by_chance = torch.cat([_by_chance(bench, null[some], faithful.random_per_pair[some], draw) for some in parts])
    names = [bench.graph.name(e) for e in edges.tolist()]
    return Minimality(names, lost.mean(0).cpu(), low.cpu(), high.cpu(), (by_chance / unit).abs().cpu(), bench.ablation)


def _by_chance(
    bench: Bench, null: Sets, values: Float[Tensor, "draw pair"], draw: torch.Generator
) -> Float[Tensor, "draw cut"]:
    """What different random edges of random circuits are worth in these."""
    n = min(_CUT, int(null[0].sum()))
    cut = torch.stack([mask.nonzero().flatten()[torch.randperm(int(mask.sum()), generator=draw)[:n]] for mask in null])
    without = null.repeat_interleave(n, 0)
    without[torch.arange(len(without)), cut.flatten()] = False
    return values.mean(1)[:, None] - bench.run(without).per_pair.mean(1).view(-1, n)
