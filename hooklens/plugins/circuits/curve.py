"""The faithfulness of circuits of growing size, cut from one set of scores, with random circuits of every size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import several
from hooklens.core.errors import InputError
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.edge_scores import EdgeScores, need_scores
from hooklens.plugins.circuits.faithfulness import LEAST_DRAWS, Faithfulness, check_draws, tied_p
from hooklens.plugins.circuits.run import Bench
from hooklens.results.result import Result, Table
from hooklens.results.statistics import quantiles

_SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Result):
    """Faithfulness of circuits of growing size, and of random circuits of every size."""

    sizes: Int[Tensor, "size"]
    values: Float[Tensor, "size"]
    low: Float[Tensor, "size"]
    high: Float[Tensor, "size"]
    random: Float[Tensor, "draw size"]
    n_edges: int
    method: str
    replacement: str
    n_pairs: int
    n_seen: int

    @property
    def area(self) -> float:
        """The area under the curve over the number of edges, from none to the largest size, divided by that size."""
        return float(self._area(self.values[None])[0])

    @property
    def distance(self) -> float:
        """The area between the curve and 1, on the same scale: 0 if all circuits are faithful."""
        return float(self._area((1 - self.values).abs()[None], start=1.0)[0])

    @property
    def random_area(self) -> Float[Tensor, "draw"]:
        """The area under the curve of random circuits, one curve a draw."""
        return self._area(self.random)

    @property
    def p(self) -> float:
        """How often random circuits are at least as close to 1 over all sizes, with the scores' own circuits counted.

        The circuits of the curve contain each other, so one that is close to 1 by chance has close neighbours; random
        circuits of different sizes are independent. So the closest of every size form one curve, and so on.
        """
        nearest_first = (1 - self.random).abs().sort(0).values
        return float(tied_p(-self._area((1 - self.values).abs()[None], 1.0)[0], -self._area(nearest_first, 1.0)))

    def _area(self, rows: Float[Tensor, "row size"], start: float = 0.0) -> Float[Tensor, "row"]:
        x = torch.cat((torch.zeros(1), self.sizes.float())).to(rows)
        y = torch.cat((torch.full_like(rows[:, :1], start), rows), 1)
        return torch.trapezoid(y, x, dim=1) / x[-1]

    def table(self, n: int | None = None) -> Table:
        """One row a size."""
        ends = quantiles(self.random.double(), (0.5, 0.95))
        columns = (self.sizes, self.values, self.low, self.high, *ends)
        rows = [(*row, self.n_pairs, self.n_seen) for row in zip(*(column.tolist() for column in columns), strict=True)]
        names = "edges", "faithfulness", "95% low", "95% high", "random: median", "random: 95%"
        return Table((*names, "pairs", "of these used to find it"), rows).head(n)

    def figure(self) -> Any:
        """The curve with its interval, and the middle 90 % of random circuits."""
        from hooklens.viz.curves import lines

        q = quantiles(self.random.double(), (0.05, 0.5, 0.95))
        known = bool(self.low.isfinite().all())
        bands = {"random circuits (5 to 95%)": (q[0], q[2])} | ({self.method: (self.low, self.high)} if known else {})
        areas = f"area {self.area:.2f}, random {self.random_area.mean():.2f}"
        seen = f"; {self.n_seen} of {self.n_pairs} pairs used to find it" if self.n_seen else ""
        title = f"Faithfulness by size ({self.replacement} ablation): {areas}{seen}"
        drawn = lines(
            {self.method: self.values, "random circuits (5 to 95%)": q[1]},
            self.sizes,
            bands,
            title,
            x_title="edges",
            y_title="faithfulness",
            marks={"the model": 1.0},
        )
        return drawn.update_xaxes(type="log")


def trace_faithfulness(
    model: HookedTransformer,
    scores: EdgeScores,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    sizes: int | Sequence[int] | None = None,
    group: Int[Tensor, "pair"] | None = None,
    draws: int = LEAST_DRAWS,
) -> FaithfulnessCurve:
    """The faithfulness of circuits of growing size, cut from one set of scores, compared with random circuits.

    Circuits of at most these `sizes` are grown from the logits (`scores.greedy_edges`). Without `sizes`: from 0.2 % to
    half of the edges.

    Reference: Hanna et al. (2024), "Have Faith in Faithfulness", section 4; Mueller et al. (2025), "MIB", section 3.
    """
    need_scores(scores, "trace_faithfulness")
    check_draws(draws)
    if sizes is None:
        sizes = [max(1, round(share * scores.graph.n_edges)) for share in _SHARES]
    wanted = several("sizes", sizes)
    circuits = {circuit.n_edges: circuit for circuit in map(scores.greedy_edges, sorted(wanted)) if circuit.n_edges}
    if not circuits:
        raise InputError(
            f"no circuit of at most {max(wanted)} edges reaches from the embedding to the logits; take larger sizes"
        )
    by_size = [circuits[n] for n in sorted(circuits)]
    return curve_of(by_size[0].bench(model, clean, corrupted, metric, group=group), scores, by_size, draws)


def curve_of(bench: Bench, scores: EdgeScores, circuits: Sequence[Circuit], draws: int) -> FaithfulnessCurve:
    """The curve of circuits that were cut from scores, the smallest first."""
    results = [Faithfulness.of(bench, circuit, draws, seed=i) for i, circuit in enumerate(circuits)]
    ends = torch.tensor([result.interval() for result in results])
    values = torch.stack([result.share(result.per_pair[None])[0] for result in results]).cpu()
    return FaithfulnessCurve(
        sizes=torch.tensor([circuit.n_edges for circuit in circuits]),
        values=values,
        low=ends[:, 0].to(values),
        high=ends[:, 1].to(values),
        random=torch.stack([result.random for result in results], 1).cpu(),
        n_edges=scores.graph.n_edges,
        method=scores.method,
        replacement=str(scores.replacement),
        n_pairs=bench.n_pairs,
        n_seen=results[0].n_seen,
    )
