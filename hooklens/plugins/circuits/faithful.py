"""How faithful is a circuit, beside random ones of its make, and how does that grow with its size?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.prompts import Prompts
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.eap import demo_circuit, demo_pairs
from hooklens.plugins.circuits.measure import Faithfulness, measured, tied_p
from hooklens.plugins.circuits.run import Bench
from hooklens.plugins.circuits.scores import EdgeScores
from hooklens.result import Result, Table

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def faithfulness(
    model: "HookedTransformer",
    circuit: Circuit,
    clean: Prompts,
    corrupted: Prompts | None,
    metric: Any,
    *,
    group: Int[Tensor, "pair"] | None = None,
    draws: int = 100,
    seed: int = 0,
) -> Faithfulness:
    """How much of what the model does is left when only the circuit's edges are live, and how much would be by chance?

    Give prompts that the circuit was not found on. `group` says which pairs share names or a sentence: intervals
    resample whole groups. Random circuits have as many edges between the same layers and kinds, on whole paths.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.random.shape, 0 < found.p <= 1, found.ablation
    (torch.Size([100]), True, 'corrupted')

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 4; Hanna et al. (2024), "Have Faith in
    Faithfulness", section 2 (normalised).
    """
    circuit.check(model)
    bench = Bench(model, clean, corrupted, metric, circuit.ablation, keep=True)
    return measured(bench, circuit, group, draws, seed)


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Result):
    """Faithfulness of circuits of growing size, cut from one set of scores, beside random ones at every size."""

    sizes: Int[Tensor, "size"]
    values: Float[Tensor, "size"]
    low: Float[Tensor, "size"]
    high: Float[Tensor, "size"]
    random: Float[Tensor, "draw size"]
    n_edges: int
    method: str
    ablation: str
    n_pairs: int
    n_seen: int

    @property
    def area(self) -> float:
        """The area under the curve over the number of edges, from none to the largest size, divided by that size."""
        return float(self._area(self.values[None])[0])

    @property
    def distance(self) -> float:
        """The area between the curve and 1, on the same scale: 0 for circuits that all do what the model does."""
        return float(self._area((1 - self.values).abs()[None], start=1.0)[0])

    @property
    def random_area(self) -> Float[Tensor, "draw"]:
        """The area under the curve of random circuits, one curve a draw."""
        return self._area(self.random)

    @property
    def p(self) -> float:
        """How often random circuits come at least as close to 1 over all sizes, the scores' own counted in."""
        away = self._area((1 - self.random).abs(), start=1.0)
        return float(tied_p(-torch.tensor(self.distance), -away))

    def _area(self, rows: Float[Tensor, "row size"], start: float = 0.0) -> Float[Tensor, "row"]:
        x = torch.cat((torch.zeros(1), self.sizes.float())).to(rows)
        y = torch.cat((torch.full_like(rows[:, :1], start), rows), 1)
        return torch.trapezoid(y, x, dim=1) / x[-1]

    def table(self, n: int | None = None) -> Table:
        """One row a size."""
        ends = torch.quantile(self.random.double(), torch.tensor([0.5, 0.95], dtype=torch.float64), dim=0)
        columns = (self.sizes, self.values, self.low, self.high, *ends)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        return Table(("edges", "faithfulness", "95% low", "95% high", "random: median", "random: 95%"), rows).head(n)

    def figure(self) -> Any:
        """The curve with its interval, and the middle 90 % of random circuits."""
        from hooklens.viz.curves import lines

        q = torch.quantile(self.random.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), dim=0)
        known = bool(self.low.isfinite().all())
        bands = {"random circuits (5 to 95%)": (q[0], q[2])} | ({self.method: (self.low, self.high)} if known else {})
        areas = f"area {self.area:.2f}, random {self.random_area.mean():.2f}"
        title = f"Faithfulness by size ({self.ablation} ablation): {areas}"
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


def faithfulness_curve(
    model: "HookedTransformer",
    scores: EdgeScores,
    clean: Prompts,
    corrupted: Prompts | None,
    metric: Any,
    *,
    sizes: Sequence[int] | None = None,
    group: Int[Tensor, "pair"] | None = None,
    draws: int = 100,
) -> FaithfulnessCurve:
    """How does faithfulness grow with the number of edges that the scores let in, and what would chance give?

    Circuits of at most these `sizes` are grown from the logits (`scores.greedy_edges`). Without `sizes`: from 0.2 % to
    half of the edges.

    Reference: Hanna et al. (2024), "Have Faith in Faithfulness", section 4; Mueller et al. (2025), "MIB", section 3.
    """
    wanted = [max(1, round(share * scores.graph.n_edges)) for share in _SHARES] if sizes is None else list(sizes)
    circuits = {circuit.n_edges: circuit for circuit in map(scores.greedy_edges, sorted(wanted)) if circuit.n_edges}
    if not circuits:
        raise InputError(
            f"no circuit of at most {max(wanted)} edges reaches from the embedding to the logits; take larger sizes"
        )
    circuits[next(iter(circuits))].check(model)
    bench = Bench(model, clean, corrupted, metric, scores.ablation, keep=True)
    found = [measured(bench, circuits[n], group, draws, seed=i) for i, n in enumerate(sorted(circuits))]
    ends = torch.tensor([one.interval() for one in found])
    values = torch.stack([one._share(one.per_pair[None])[0] for one in found]).cpu()
    return FaithfulnessCurve(
        torch.tensor(sorted(circuits)),
        values,
        ends[:, 0].to(values),
        ends[:, 1].to(values),
        torch.stack([one.random for one in found], 1).cpu(),
        scores.graph.n_edges,
        scores.method,
        scores.ablation,
        bench.n_pairs,
        found[0].n_seen,
    )


def demo(model: "HookedTransformer") -> Faithfulness:
    """A few edges found on two short prompt pairs, evaluated on two others; any model, no tokenizer needed."""
    clean, corrupted, metric = demo_pairs(model, 4)
    circuit = demo_circuit(model, clean[:2], corrupted[:2], metric)
    return faithfulness(model, circuit, clean[2:], corrupted[2:], metric)
