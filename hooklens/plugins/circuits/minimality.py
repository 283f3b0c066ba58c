"""Minimality: is each edge of the circuit needed in some part of it, and more than edges of random circuits?"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.plugins.circuits.faithfulness import Faithfulness, slack
from hooklens.plugins.circuits.random_draws import Subsets, subsets
from hooklens.plugins.circuits.run import Bench, chunks
from hooklens.results.result import Result, Table
from hooklens.results.statistics import halves, mean_interval, q_values

_SETS = 8  # sets K without which an edge is tried: none, four single nodes, two of edges, one of nodes
_CUT = 5  # edges of each random circuit that are tried
_MASKS = 20_000_000  # numbers of masks at once
Worth = Float[Tensor, "circuit cut set pair"]


@dataclass(frozen=True, eq=False)
class Minimality(Result):
    """What each edge e is worth: m(C without K) - m(C without K and e), as a share of m(M) - m(empty).

    `effect` is the worth for the one of several sets K of the circuit's other edges for which it is largest, so that an
    edge that others can replace is not called idle. For every pair, K is chosen on the half of the groups without the
    pair, so that the choice does not bias the effect. (One group: on the same pairs.) `given` is the best K over all
    pairs, and `alone` is the worth with K empty.

    `null` is the same, as an absolute value, of random edges of each random circuit, searched in the same way; `q` are
    Benjamini-Hochberg values, over the circuit's edges, of being worth more than those.
    """

    ranked_by = "what the edge is worth"

    edges: list[str]
    effect: Float[Tensor, "edge"]
    low: Float[Tensor, "edge"]
    high: Float[Tensor, "edge"]
    alone: Float[Tensor, "edge"]
    given: list[str]
    null: Float[Tensor, "draw cut"]
    replacement: str

    @property
    def p(self) -> Float[Tensor, "edge"]:
        """How often a random edge is worth as much, over the random circuits and this one, each of equal weight.

        If this circuit were a random one, all ranks of a random edge of it would be equally likely. Edges of a circuit
        are not independent, so many of them do not make p smaller than the number of circuits allows. Only some edges
        of a random circuit were tried. An edge counts itself as one of as many, because the best of all edges of a
        circuit exceeds the best of a few by chance.
        """
        size = self.effect.abs()
        least = size - slack(self.null)
        reached = torch.stack([(self.null >= value).double().mean(1).sum() for value in least])
        own = (size >= least[:, None]).double().mean(1).clamp_min(1 / self.null.shape[1])
        return torch.where(size.isnan(), torch.nan, (reached + own) / (len(self.null) + 1))

    @property
    def q(self) -> Float[Tensor, "edge"]:
        return q_values(self.p)

    @property
    def least_q(self) -> float:
        """The q of a single edge that no random circuit's edge reaches; several such edges have less."""
        draws, cut = self.null.shape
        return max(1.0, len(self.edges) / cut) / (draws + 1)

    @property
    def idle(self) -> list[str] | None:
        """Edges whose interval includes 0: the circuit may not need them. None if there are no intervals."""
        if not bool((self.low.isfinite() & self.high.isfinite()).all()):
            return None
        return [name for name, a, b in zip(self.edges, self.low, self.high, strict=True) if a <= 0 <= b]

    def table(self, n: int | None = 20) -> Table:
        """One row an edge."""
        order = self.effect.abs().argsort(descending=True, stable=True).tolist()
        columns = (self.effect, self.low, self.high, self.q, self.alone)
        rows = [(self.edges[i], *(float(column[i]) for column in columns), self.given[i]) for i in order[:n]]
        return Table(("edge", "worth (share)", "95% low", "95% high", "q", "with all others", "most without"), rows)

    def figure(self) -> Any:
        """The 40 edges with the largest effects, with their intervals."""
        from hooklens.viz.figures import bars

        order = self.effect.abs().argsort(descending=True, stable=True)[:40].tolist()
        title = f"Minimality: what each edge is worth ({self.replacement} ablation)"
        values, low, high = (part[order] for part in (self.effect, self.low, self.high))
        names = [self.edges[i] for i in order]
        return bars(values, low, high, names, title, y_title="share of the difference")


def minimality_of(bench: Bench, faithful: Faithfulness, null: Subsets, draw: torch.Generator) -> Minimality:
    """The worth of every edge of the circuit, and of some random edges of each random circuit."""
    kept, unit = faithful.circuit.kept.cpu(), faithful.unit
    edges = kept.nonzero().flatten()
    sets, names = subsets(bench.graph, kept, _SETS, draw)
    parts = [edges[some] for some in chunks(len(edges), max(1, _MASKS // (_SETS * len(kept))))]
    worth = torch.cat([_worth(bench, kept[None], sets[None], part[None]) for part in parts], 1)[0] / unit
    own, best = _most(worth, faithful.group)
    low, high = mean_interval(own.T, group=faithful.group)
    by_chance = _by_chance(bench, null, faithful.group, draw) / unit
    return Minimality(
        edges=[bench.graph.name(e) for e in edges.tolist()],
        effect=own.mean(1).cpu(),
        low=low.cpu(),
        high=high.cpu(),
        alone=worth[:, 0].mean(1).cpu(),
        given=[names[i] for i in best.tolist()],
        null=by_chance.abs().cpu(),
        replacement=str(bench.replacement),
    )


def _worth(
    bench: Bench,
    kept: Bool[Tensor, "circuit edge"],
    sets: Bool[Tensor, "circuit set edge"],
    cut: Int[Tensor, "circuit cut"],
) -> Worth:
    """m(C without K) - m(C without K and e) for every set K and edge e; K never holds e itself.

    One run more a set and edge: where the set holds the edge, the edge is put back, else it is cut.
    """
    (n, n_sets), n_cut = sets.shape[:2], cut.shape[1]
    at = cut[:, None].expand(-1, n_sets, -1)
    held = sets.gather(2, at)
    masks = (kept[:, None] & ~sets)[:, :, None].repeat(1, 1, 1 + n_cut, 1)
    masks[:, :, 1:].scatter_(3, at[..., None], held[..., None])
    runs = bench.run(masks.flatten(0, 2)).per_pair.view(n, n_sets, 1 + n_cut, -1)
    fall = runs[:, :, :1] - runs[:, :, 1:]
    return torch.where(held[..., None].to(fall.device), -fall, fall).transpose(1, 2)


def _most(
    worth: Float[Tensor, "edge set pair"], group: Int[Tensor, "pair"]
) -> tuple[Float[Tensor, "edge pair"], Int[Tensor, "edge"]]:
    """Each edge's worth, pair by pair, without the set that the other half of the pairs chose; the best set of all."""
    every = torch.arange(worth.shape[2])
    parts = halves(len(every), group=group) if int(group.max()) > 0 else (every, every)
    chosen = torch.empty_like(worth[:, 0])
    for asked, other in (parts, parts[::-1]):
        best = _largest(worth[:, :, other])
        chosen[:, asked] = worth[torch.arange(len(worth)), best][:, asked]
    return chosen, _largest(worth)


def _largest(worth: Float[Tensor, "edge set pair"]) -> Int[Tensor, "edge"]:
    """The set of the largest mean, whatever its sign; the first of those that differ by rounding alone."""
    size = worth.mean(2).abs().nan_to_num()
    return (size >= size.amax(1, keepdim=True) - slack(size)).long().argmax(1).cpu()


def _by_chance(
    bench: Bench, null: Bool[Tensor, "draw edge"], group: Int[Tensor, "pair"], draw: torch.Generator
) -> Float[Tensor, "draw cut"]:
    """The worth of different random edges of random circuits, searched as that of the circuit's own edges."""
    n = min(_CUT, int(null[0].sum()))
    effects = []
    for some in chunks(len(null), max(1, _MASKS // (_SETS * (1 + n) * null.shape[1]))):
        masks = null[some]
        cut = [mask.nonzero().flatten()[torch.randperm(int(mask.sum()), generator=draw)[:n]] for mask in masks]
        sets = torch.stack([subsets(bench.graph, mask, _SETS, draw)[0] for mask in masks])
        worth = _worth(bench, masks, sets, torch.stack(cut))
        effects.append(_most(worth.flatten(0, 1), group)[0].mean(1).view(-1, n))
    return torch.cat(effects)
