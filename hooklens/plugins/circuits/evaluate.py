"""Is a circuit faithful, complete and minimal? All three on held-out prompts, beside random circuits of its make."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.prompts import Prompts
from hooklens.model.linear import packed_linears
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.eap import demo_circuit, demo_pairs
from hooklens.plugins.circuits.measure import Faithfulness, measured, tied_p
from hooklens.plugins.circuits.random_circuits import random_circuits
from hooklens.plugins.circuits.run import Bench, chunks
from hooklens.result import Result, Table
from hooklens.statistics import mean_interval, q_values

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

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


@dataclass(frozen=True, eq=False)
class Minimality(Result):
    """What each edge of the circuit is worth: m(C) - m(C without it), as a share of m(M) - m(empty), per edge.

    `null` is the same of one random edge of each random circuit, whatever its sign; `q` are Benjamini-Hochberg values
    over the circuit's edges of having a larger effect than that.
    """

    edges: list[str]
    effect: Float[Tensor, "edge"]
    low: Float[Tensor, "edge"]
    high: Float[Tensor, "edge"]
    null: Float[Tensor, "draw"]
    ablation: str

    @property
    def p(self) -> Float[Tensor, "edge"]:
        """How often a random circuit's edge is worth as much."""
        return tied_p(self.effect.abs(), self.null[:, None].expand(-1, len(self.effect)))

    @property
    def q(self) -> Float[Tensor, "edge"]:
        return q_values(self.p)

    @property
    def idle(self) -> list[str]:
        """Edges whose interval includes 0, so that the circuit may do without them."""
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


@dataclass(frozen=True, eq=False)
class CircuitEvaluation(Result):
    """Faithfulness, completeness and minimality of one circuit, measured on the same prompts."""

    faithfulness: Faithfulness
    completeness: Completeness
    minimality: Minimality

    def table(self, n: int | None = None) -> Table:
        """The three in rows, each beside random circuits."""
        faithful, complete, minimal = self.faithfulness, self.completeness, self.minimality
        rows = [
            *faithful.table().rows,
            ("completeness: worst gap over all K (0 is complete)", complete.worst),
            ("completeness: over random K", float(complete.random.max())),
            ("completeness: random circuits, median", float(complete.null.median())),
            ("completeness: p", complete.p),
            ("edges worth more than a random circuit's (q < 0.05)", int((minimal.q < 0.05).sum())),
            ("edges that may be worth nothing", len(minimal.idle)),
        ]
        return Table(("what", "value"), rows).head(n)

    def figure(self) -> Any:
        """Faithfulness beside random circuits; `.completeness` and `.minimality` draw themselves."""
        return self.faithfulness.figure()


def evaluate(
    model: "HookedTransformer",
    circuit: Circuit,
    clean: Prompts,
    corrupted: Prompts | None,
    metric: Any,
    *,
    group: Int[Tensor, "pair"] | None = None,
    draws: int = 100,
    seed: int = 0,
) -> CircuitEvaluation:
    """Does the circuit do what the model does, does it hold all of it, and does it need every edge?

    Give prompts that the circuit was not found on. `draws` random circuits of the same size, layer profile and
    connectivity stand beside each of the three. About (3 + 2 * 10) * `draws` runs of circuits.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model(n_layers=1))
    >>> found.minimality.effect.shape == (found.faithfulness.circuit.n_edges,)
    True

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 4 (faithfulness, completeness, minimality);
    Shi et al. (2024), "Hypothesis Testing the Circuit Hypothesis in LLMs" (random circuits).
    """
    circuit.check(model)
    if not circuit.n_edges:
        raise InputError("the circuit has no edges, so there is nothing to evaluate; take more edges")
    bench = Bench(model, clean, corrupted, metric, circuit.ablation, keep=True)
    with torch.no_grad(), packed_linears(rows=512):
        faithful = measured(bench, circuit, group, draws, seed)
        null = random_circuits(bench.graph, circuit.kept, draws, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        unit = faithful.model_per_pair.mean() - faithful.empty_per_pair.mean()
        unit = unit.abs() if faithful.defined else torch.full_like(unit, torch.nan)
        complete = _complete(bench, circuit, null, unit, draw)
        minimal = _minimal(bench, circuit, null, faithful, unit, draw)
    return CircuitEvaluation(faithful, complete, minimal)


def _complete(
    bench: Bench, circuit: Circuit, null: Sets, unit: Float[Tensor, ""], draw: torch.Generator
) -> Completeness:
    kept = circuit.kept.cpu()
    sets = random_subsets(kept, _RANDOM, draw)
    gaps = _gaps(bench, kept, sets) / unit
    greedy, edges = _greedy(bench, kept, draw)
    names = [bench.graph.name(e) for e in edges]
    each = []
    for some in chunks(len(null), max(1, _MASKS // (2 * _RANDOM * len(kept)))):
        one = null[some].repeat_interleave(_RANDOM, 0)
        without = torch.cat([random_subsets(mask, _RANDOM, draw) for mask in null[some]])
        each.append(_gaps(bench, one, without).view(-1, _RANDOM).amax(1))
    return Completeness(gaps, sets.sum(1), greedy / unit, names, torch.cat(each) / unit, bench.ablation)


def random_subsets(kept: Bool[Tensor, "edge"], n: int, draw: torch.Generator) -> Sets:
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


def _minimal(
    bench: Bench, circuit: Circuit, null: Sets, faithful: Faithfulness, unit: Tensor, draw: torch.Generator
) -> Minimality:
    kept = circuit.kept.cpu()
    edges = kept.nonzero().flatten()
    without = kept.repeat(len(edges), 1)
    without[torch.arange(len(edges)), edges] = False
    lost = (faithful.per_pair - bench.run(without).per_pair).T / unit  # pair edge
    low, high = torch.full((2, len(edges)), torch.nan, dtype=lost.dtype)
    if int(faithful.group.max()) > 0:
        low, high = mean_interval(lost, group=faithful.group)
    one = torch.stack([mask.nonzero().flatten()[_below(int(mask.sum()), draw)] for mask in null])
    cut = null.clone()
    cut[torch.arange(len(cut)), one] = False
    by_chance = (faithful.random_per_pair - bench.run(cut).per_pair).mean(1) / unit
    names = [bench.graph.name(e) for e in edges.tolist()]
    return Minimality(names, lost.mean(0).cpu(), low.cpu(), high.cpu(), by_chance.abs().cpu(), bench.ablation)


def _below(n: int, draw: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=draw))


def demo(model: "HookedTransformer") -> CircuitEvaluation:
    """A few edges found on two short prompt pairs, evaluated on two others; any model, no tokenizer needed."""
    clean, corrupted, metric = demo_pairs(model, 4)
    circuit = demo_circuit(model, clean[:2], corrupted[:2], metric)
    return evaluate(model, circuit, clean[2:], corrupted[2:], metric)
