"""Automated circuit discovery: walk from the logits down and cut every edge, or node, that the metric does not need."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import real
from hooklens.core.errors import ArgumentError
from hooklens.core.progress_bar import progress
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.run import Bench
from hooklens.results.result import Result, Table
from hooklens.sweeps.replacement import Value

_MOST = 64  # cuts that are tried at once


@dataclass(frozen=True, eq=False)
class Discovery(Result):
    """The circuit that is left, and the effect of each cut, made or refused, on the metric.

    `drop` is how far the metric fell when the unit was cut from the edges left at that time. It is NaN for a unit that
    was not tried because none of its edges led to the logits any longer.
    """

    ranked_by = "the metric's fall without the unit"

    circuit: Circuit
    units: list[str]
    drop: Float[Tensor, "unit"]
    removed: Bool[Tensor, "unit"]
    threshold: float
    base: float
    metric_of_circuit: float
    empty: float
    n_runs: int

    @property
    def kept(self) -> list[str]:
        """The units that were kept, in the order in which they were tried."""
        return [unit for unit, gone in zip(self.units, self.removed.tolist(), strict=True) if not gone]

    def table(self, n: int | None = 20) -> Table:
        """The kept units, ranked by how far the metric falls without them."""
        kept = (~self.removed).nonzero().flatten()
        order = kept[self.drop[kept].argsort(descending=True, stable=True)].tolist()[:n]
        return Table(("kept", "the metric's fall if cut"), [(self.units[i], float(self.drop[i])) for i in order])

    def figure(self) -> Any:
        """The circuit that is left."""
        return self.circuit.figure()


def acdc(
    model: HookedTransformer,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    threshold: float,
    value: Value = "corrupted",
) -> Discovery:
    """Which edges can be cut one after another, each at the cost of less than `threshold`? Exact, from the logits down.

    Receivers are visited from the logits to the embedding, the edges into each from the latest source to the earliest.
    An edge is cut for good when the metric, mean over pairs, falls by less than the threshold; one that rises without
    it is cut too. With `hl.kl(model, clean)` as metric this is the divergence of the paper.

    >>> from hooklens.testing import or_gate
    >>> found = acdc(or_gate(), [[0]], None, lambda logits: logits[:, -1, 1], threshold=0.1, value="zero")
    >>> found.kept                               # one of the two heads: either is enough
    ['MLP0->logits', 'L0H0->MLP0']

    Many cuts are tried in one batch, each as if those before it had been made, and the cuts after the first refused one
    are tried again. So the result is that of one trial after the other.

    Reference: Conmy et al. (2023), "Towards Automated Circuit Discovery", algorithm 1.
    """
    threshold = _checked_fall(threshold)
    bench = Bench(model, as_pairs(model, clean, corrupted, metric), value, keep=True)
    graph = bench.graph
    names = [graph.name(edge) for edge in range(graph.n_edges)]
    stages = [range(to.start, to.start + to.columns)[::-1] for to in graph.receivers[::-1]]
    return _discover(_Walk(bench, torch.arange(graph.n_edges), names), stages, "ACDC", threshold)


def acdc_nodes(
    model: HookedTransformer,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    threshold: float,
    value: Value = "corrupted",
) -> Discovery:
    """Which whole nodes can be cut one after another, the last first? Every reader then gets its ablated output.

    >>> from hooklens.testing import or_gate
    >>> logit = lambda logits: logits[:, -1, 1]
    >>> acdc_nodes(or_gate(), [[0]], None, logit, threshold=0.1, value="zero").kept
    ['MLP0', 'L0H0']

    Reference: Conmy et al. (2023), "Towards Automated Circuit Discovery", algorithm 1, on nodes.
    """
    threshold = _checked_fall(threshold)
    bench = Bench(model, as_pairs(model, clean, corrupted, metric), value, keep=True)
    graph = bench.graph
    stages = [range(graph.n_sources)[::-1]]
    return _discover(_Walk(bench, graph.ends[0], graph.source_names), stages, "ACDC over nodes", threshold)


def _checked_fall(threshold: Any) -> float:
    """The fall of the metric from which on a cut is refused."""
    number = real("threshold", threshold)
    if number <= 0:
        raise ArgumentError(
            "{threshold} is how far the metric may fall at one cut, a number above 0; got {0}", threshold
        )
    return number


class _Walk:
    """The edges that are left, the metric with them, and each trial's outcome. `of_edge`: the unit of each edge."""

    def __init__(self, bench: Bench, of_edge: Int[Tensor, "edge"], names: list[str]):
        self.bench, self.of_edge, self.names = bench, of_edge, names
        self.kept = torch.ones(bench.graph.n_edges, dtype=torch.bool)
        means = bench.means(self.kept)
        self.base = self.value = float(means)
        self.n_runs, self.width = 1, 8
        self.drop = torch.full((len(names),), torch.nan, dtype=means.dtype)
        self.removed = torch.zeros(len(names), dtype=torch.bool)

    def cut_if_idle(self, stage: list[int]) -> bool:
        """Cut a stage none of whose edges leads to the logits any longer, and say so."""
        of_stage = torch.isin(self.of_edge, torch.tensor(stage))
        if bool((self.bench.graph.on_a_path(self.kept[None], rooted=False)[0] & of_stage).any()):
            return False
        self.removed[stage] = True
        self.kept = self.kept & ~of_stage
        return True

    def try_all(self, stage: list[int], threshold: float) -> None:
        """Cut the units of a stage one after another, where the metric falls by less than the threshold."""
        while stage:
            batch = stage[: self.width]
            masks, kept = [], self.kept
            for unit in batch:
                kept = kept & (self.of_edge != unit)
                masks.append(kept)
            means = self.bench.means(torch.stack(masks))
            falls = torch.cat((means.new_tensor([self.value]), means))[:-1] - means
            self.n_runs += len(batch)
            refused = (falls >= threshold).nonzero().flatten().tolist()
            n_cut = refused[0] if refused else len(batch)
            self.drop[batch[: n_cut + 1]] = falls[: n_cut + 1]
            if n_cut:
                self.removed[batch[:n_cut]] = True
                self.kept, self.value = masks[n_cut - 1], float(means[n_cut - 1])
            self.width = max(1, self.width // 2) if refused else min(2 * self.width, _MOST)
            stage = stage[n_cut + bool(refused) :]


def _discover(walk: _Walk, stages: Sequence[Sequence[int]], method: str, threshold: float) -> Discovery:
    """Try the units of each stage in order; the units of a stage are idle together."""
    bench, bar = walk.bench, progress(method, len(walk.names), unit="units")
    with torch.no_grad(), packed_linears(rows=512), bar as advance:
        for stage in map(list, stages):
            if not walk.cut_if_idle(stage):
                walk.try_all(stage, threshold)
            advance(len(stage))
    order = [unit for stage in stages for unit in stage]
    tidy = bench.tidy(walk.kept)
    circuit = Circuit(
        graph=bench.graph,
        kept=tidy,
        # the score of an edge is the fall of the metric without its unit; a node's edges share one score
        scores=torch.where(tidy, walk.drop.nan_to_num(0.0)[walk.of_edge], 0.0),
        method=f"{method}, threshold {threshold:g}",
        replacement=bench.replacement,
        model_name=bench.model.cfg.model_name,
        dropped=int(walk.kept.sum() - tidy.sum()),
        found_on=bench.digests(),
    )
    return Discovery(
        circuit=circuit,
        units=[walk.names[unit] for unit in order],
        drop=walk.drop[order],
        removed=walk.removed[order],
        threshold=float(threshold),
        base=walk.base,
        metric_of_circuit=walk.value,
        empty=float(bench.empty_per_pair.mean()),
        n_runs=walk.n_runs,
    )


def demo(model: HookedTransformer) -> Discovery:
    """Whole nodes of a short prompt pair, at a threshold of a tenth of the difference; any model."""
    pairs = demo_pairs(model)
    metric = pairs.metric_of(model)
    with torch.no_grad():
        gap = float((metric(model(pairs.clean)) - metric(model(pairs.corrupted))).mean())
    return acdc_nodes(model, pairs, threshold=max(abs(gap) / 10, 1e-6))
