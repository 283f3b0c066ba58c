"""Pruning by exact effects: measure the worth of each edge or node in a circuit, and cut those of the least."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import real, whole
from hooklens.core.errors import ArgumentError
from hooklens.core.progress_bar import progress
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.circuit import Circuit, need_circuit, whole_circuit
from hooklens.plugins.circuits.run import Bench
from hooklens.results.result import Result, Table

Units = Int[Tensor, "edge"]  # the number of the unit (an edge or a node) that each edge belongs to


@dataclass(frozen=True, eq=False)
class Pruning(Result):
    """The circuit that is left, with the last measured effects as scores, and the metric after every round."""

    circuit: Circuit
    sizes: Int[Tensor, "round"]
    metric: Float[Tensor, "round"]
    base: float
    empty: float

    def table(self, n: int | None = None) -> Table:
        """One row a round: how many edges were left, and the metric with them."""
        rows = zip(self.sizes.tolist(), self.metric.tolist(), strict=True)
        return Table(("edges", "metric"), list(rows)).head(n)

    def figure(self) -> Any:
        """The metric as edges are cut."""
        from hooklens.viz.curves import lines

        marks = {"the model": self.base, "no edge": self.empty}
        name = f"{self.circuit.method} ({self.circuit.replacement} ablation)"
        return lines({name: self.metric}, self.sizes, title=name, x_title="edges", y_title="metric", marks=marks)


def prune_edges(
    model: HookedTransformer,
    circuit: Circuit,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    size: int,
    share: float = 0.1,
) -> Pruning:
    """Greedy: cut the edges of the least worth, a `share` of them at a time, until `size` are left.

    The worth of an edge is |m(C) - m(C without it)|, exact, mean over pairs, measured again after every round. Edges
    that are no longer on a path are cut too. Start from every edge with `whole_circuit(model)`.

    >>> from hooklens.testing import or_gate
    >>> gate, logit = or_gate(), lambda logits: logits[:, -1, 1]
    >>> start = whole_circuit(gate, value="zero")
    >>> prune_edges(gate, start, [[0]], None, logit, size=2, share=0.01).circuit.edges
    ['L0H1->MLP0', 'MLP0->logits']
    """
    need_circuit(circuit, "prune_edges")
    size, share = _checked_pace(size, share)
    bench = circuit.bench(model, clean, corrupted, metric)
    return _greedily(bench, circuit, torch.arange(bench.graph.n_edges), size, share=share, name="greedy pruning")


def prune_nodes(
    model: HookedTransformer,
    circuit: Circuit,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    size: int,
    share: float = 0.1,
) -> Pruning:
    """Greedy, whole nodes at a time: the worth of a node is that of all edges that leave it, together.

    `size` counts nodes that edges leave, the embedding included.
    """
    need_circuit(circuit, "prune_nodes")
    size, share = _checked_pace(size, share)
    bench = circuit.bench(model, clean, corrupted, metric)
    return _greedily(bench, circuit, bench.graph.ends[0], size, share=share, name="greedy pruning of nodes")


def prune_edges_below(
    model: HookedTransformer,
    circuit: Circuit,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    threshold: float,
) -> Pruning:
    """Threshold: cut at once every edge that alone is worth less. Edges that can replace each other are all cut."""
    need_circuit(circuit, "prune_edges_below")
    threshold = real("threshold", threshold, 0.0)
    bench = circuit.bench(model, clean, corrupted, metric)
    return _below(bench, circuit, torch.arange(bench.graph.n_edges), threshold, name="threshold pruning")


def prune_nodes_below(
    model: HookedTransformer,
    circuit: Circuit,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    threshold: float,
) -> Pruning:
    """Threshold: cut at once every node that alone is worth less."""
    need_circuit(circuit, "prune_nodes_below")
    threshold = real("threshold", threshold, 0.0)
    bench = circuit.bench(model, clean, corrupted, metric)
    return _below(bench, circuit, bench.graph.ends[0], threshold, name="threshold pruning of nodes")


def _checked_pace(size: Any, share: Any) -> tuple[int, float]:
    """The size at which greedy pruning stops, and the share that is cut in a round."""
    size, number = whole("size", size, 1), real("share", share)
    if not 0 < number < 1:
        raise ArgumentError("{share} is the part cut in a round, between 0 and 1, for example 0.1; got {0}", share)
    return size, number


def _greedily(bench: Bench, circuit: Circuit, of_edge: Units, size: int, *, share: float, name: str) -> Pruning:
    """Cut the units of least worth, measure again, and go on until `size` are left."""
    kept, rounds = circuit.kept.cpu(), []
    bar = progress(name, max(len(of_edge[kept].unique()) - size, 1), unit="units")
    with torch.no_grad(), packed_linears(rows=512), bar as advance:
        while True:
            units, worth, value = _worth(bench, kept, of_edge)
            rounds.append((kept, value))
            if len(units) <= size:
                break
            cut = min(max(1, int(share * len(units))), len(units) - size)
            least = units[worth[units].abs().argsort(stable=True)[:cut]]
            kept = bench.tidy(kept & ~torch.isin(of_edge, least))
            advance(len(units) - len(of_edge[kept].unique()))
    return _result(bench, circuit, rounds, worth[of_edge], f"{name} to {size}")


def _below(bench: Bench, circuit: Circuit, of_edge: Units, threshold: float, *, name: str) -> Pruning:
    """Cut all units of less worth than the threshold, measured once."""
    start = circuit.kept.cpu()
    with torch.no_grad(), packed_linears(rows=512):
        _, worth, value = _worth(bench, start, of_edge)
        kept = bench.tidy(start & (worth.abs() >= threshold)[of_edge])
        rounds = [(start, value), (kept, float(bench.means(kept)))]
    return _result(bench, circuit, rounds, worth[of_edge], f"{name} at {threshold:g}")


def _worth(bench: Bench, kept: Tensor, of_edge: Units) -> tuple[Tensor, Float[Tensor, "unit"], float]:
    """The kept units, what the metric loses without each (0 for the others), and the metric with all of them."""
    units = of_edge[kept].unique()
    means = bench.means(torch.cat((kept[None], *(kept & (of_edge != unit)[None] for unit in units))))
    worth = means.new_zeros(int(of_edge.max()) + 1).index_copy_(0, units, means[0] - means[1:])
    return units, worth, float(means[0])


def _result(bench: Bench, circuit: Circuit, rounds: list, worth: Float[Tensor, "edge"], name: str) -> Pruning:
    kept, metric = rounds[-1][0], torch.tensor([value for _, value in rounds], dtype=worth.dtype)
    left = replace(
        circuit,
        kept=kept,
        scores=torch.where(kept, worth, 0.0),
        method=f"{circuit.method}, {name}",
        found_on=list(dict.fromkeys([*circuit.found_on, *bench.digests()])),
    )
    sizes = torch.tensor([int(kept.sum()) for kept, _ in rounds])
    return Pruning(circuit=left, sizes=sizes, metric=metric, base=bench.base, empty=float(bench.empty_per_pair.mean()))


def demo(model: HookedTransformer) -> Pruning:
    """From every edge of the model down to a handful, on one short prompt pair; numbers without a tokenizer."""
    return prune_edges(model, whole_circuit(model), demo_pairs(model), size=5, share=0.3)
