"""Is a circuit faithful, complete and minimal? All three on held-out prompts, compared with random circuits."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.circuit import Circuit, need_circuit
from hooklens.plugins.circuits.completeness import Completeness, completeness_of
from hooklens.plugins.circuits.edge_attribution import demo_circuit
from hooklens.plugins.circuits.faithfulness import LEAST_DRAWS, Faithfulness, check_draws
from hooklens.plugins.circuits.minimality import Minimality, minimality_of
from hooklens.plugins.circuits.random_draws import random_circuits
from hooklens.results.result import Result, Table


@dataclass(frozen=True, eq=False)
class CircuitEvaluation(Result):
    """Faithfulness, completeness and minimality of one circuit, measured on the same prompts."""

    faithfulness: Faithfulness
    completeness: Completeness
    minimality: Minimality

    def table(self, n: int | None = None) -> Table:
        """All three in rows, each compared with random circuits."""
        faithful, complete, minimal = self.faithfulness, self.completeness, self.minimality
        idle, q = minimal.idle, minimal.q
        rows = [
            *faithful.table().rows,
            ("completeness: worst gap over all K (0 is complete)", complete.worst),
            ("completeness: over random K", float(complete.random.max())),
            ("completeness: random circuits, median", float(complete.null.median())),
            ("completeness: p", complete.p),
            ("completeness: share that all other edges keep (0 is complete)", complete.complement),
            ("all other edges: 95% low", complete.complement_low),
            ("all other edges: 95% high", complete.complement_high),
            ("all other edges: random circuits, median", float(complete.complement_null.median())),
            ("all other edges: p", complete.complement_p),
            ("edges worth more than a random circuit's (q < 0.05)", None if q.isnan().any() else int((q < 0.05).sum())),
            ("edges that may be worth nothing", None if idle is None else len(idle)),
        ]
        return Table(("what", "value"), rows).head(n)

    def figure(self) -> Any:
        """Faithfulness beside random circuits; `.completeness` and `.minimality` draw themselves."""
        return self.faithfulness.figure()


def evaluate_circuit(
    model: HookedTransformer,
    circuit: Circuit,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    group: Int[Tensor, "pair"] | None = None,
    draws: int = LEAST_DRAWS,
    seed: int = 0,
) -> CircuitEvaluation:
    """Is the circuit faithful to the model, is it complete, and is every edge needed?

    Give prompts that the circuit was not found on. All three are compared with `draws` random circuits of the same
    size, layer profile and connectivity. This takes about (2 + 2 * 10 + 8 * 6) * `draws` runs of circuits.

    Completeness and minimality are searches over sets K of the circuit's edges, so their values are not bounds. The
    result has completeness by Wang et al. and by Marks et al. (the share that all edges outside the circuit keep).

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model(n_layers=1))
    >>> found.minimality.effect.shape == (found.faithfulness.circuit.n_edges,)
    True

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 4 (faithfulness, completeness, minimality);
    Marks et al. (2024), "Sparse Feature Circuits", section 4 (completeness by the complement); Shi et al. (2024),
    "Hypothesis Testing the Circuit Hypothesis in LLMs" (random circuits).
    """
    need_circuit(circuit, "evaluate_circuit")
    check_draws(draws)
    bench = circuit.bench(model, clean, corrupted, metric, group=group)
    with torch.no_grad(), packed_linears(rows=512):
        faithful = Faithfulness.of(bench, circuit, draws, seed)
        null = random_circuits(bench.graph, circuit.kept, draws, seed=seed)
        draw = seeded(seed)
        complete = completeness_of(bench, faithful, null, draw)
        minimal = minimality_of(bench, faithful, null, draw)
    return CircuitEvaluation(faithful, complete, minimal)


def demo(model: HookedTransformer) -> CircuitEvaluation:
    """A few edges found on two short prompt pairs, evaluated on two others; numbers without a tokenizer."""
    pairs = demo_pairs(model, 4)
    return evaluate_circuit(model, demo_circuit(model, pairs[:2]), pairs[2:])
