"""Edge attribution patching: a score for every edge of the model from two forward passes and one backward."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.gradients import need_gradients
from hooklens.core.progress_bar import progress, within
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts
from hooklens.metrics import ReadingMetric
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.edge_scores import EdgeScores
from hooklens.plugins.circuits.gradient_pass import (
    differentiable_values,
    edge_gradients,
    edge_scores,
    pairs_at_once,
)
from hooklens.plugins.circuits.graph import CircuitGraph, circuit_graph
from hooklens.plugins.circuits.node_runs import AblatedOf, Run, ablated_runs, refuse, walk
from hooklens.plugins.circuits.run import aligned_pairs, chunks, of_pairs
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.replacement import Value, as_replacement
from hooklens.sweeps.settings import current

#: Of a batch: every pair's edge scores, and the metric of the clean run.
Scored = tuple[Float[Tensor, "pair edge"], Float[Tensor, "pair"]]


def eap(
    model: HookedTransformer,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    value: Value = "corrupted",
) -> EdgeScores:
    """How much would the metric fall if one edge carried the ablated run? A linear estimate for every edge at once.

    The score of an edge is (what its source writes in the clean run - in the ablated run) times the gradient of the
    metric by what its receiver reads in the clean run, summed over positions. It is exact where the model is linear.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(n_layers=1)
    >>> scores = eap(model, [[1, 2, 3]], [[1, 4, 3]], lambda logits: logits[:, -1, 5])
    >>> scores.scores.shape, scores.top_edges(3).n_edges <= 3
    (torch.Size([13]), True)

    Reference: Syed et al. (2023), "Attribution Patching Outperforms Automated Circuit Discovery", equation 2; Nanda
    (2023), "Attribution Patching".
    """
    return scored(model, as_pairs(model, clean, corrupted, metric), value, "EAP", _clean_gradient)


def _clean_gradient(model, graph: CircuitGraph, metric: Any, clean: Tensor, ablated: Run) -> Scored:
    with torch.no_grad():
        embedded = model(clean, stop_at_layer=0)
    run = walk(model, graph, embedded.requires_grad_())
    reader = Reader(model, metric, run.streams[-1].detach())
    gradients = edge_gradients(model, graph, run, differentiable_values(reader, run.streams[-1]))
    return edge_scores(graph, gradients, run.nodes - ablated.nodes), reader.base


def scored(
    model: HookedTransformer, pairs: PromptPairs, value: Value, name: str, one_batch: Callable[..., Scored]
) -> EdgeScores:
    """The scores that a method gives, computed batch by batch."""
    need_gradients(name)
    refuse(model)
    graph, replacement, n = circuit_graph(model), as_replacement(value), len(pairs)
    groups = aligned_pairs(model, pairs, replacement)
    with torch.no_grad():
        runs = list(ablated_runs(model, graph, groups, replacement))
    parts = []
    with progress(name, n, unit="pairs") as advance:
        for metric, clean, ablated in _batches(model, graph, pairs.metric, runs):
            with torch.no_grad():
                empty = Reader(model, metric, ablated.streams[-1].expand(len(clean), -1, -1)).base
            with (
                torch.enable_grad(),
                within(advance, len(clean), 1),
            ):  # a method of several steps moves the bar
                scores, base = one_batch(model, graph, metric, clean, ablated)
            parts.append((base, empty, scores.detach().sum(0), scores.detach().square().sum(0)))
    base, empty = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    total, squares = (torch.stack([part[i] for part in parts]).sum(0) for i in (2, 3))
    mean = total / n
    spread = (squares / n - mean.square()).clamp_min(0) * n / (n - 1) if n > 1 else torch.full_like(mean, torch.nan)
    if not bool(mean.isfinite().all()):
        raise InputError("some edge's score is not finite: the metric or its gradient is not; try hooklens check")
    return EdgeScores(
        graph=graph,
        scores=mean,
        std_error=(spread / n).sqrt(),
        base=float(base.mean()),
        empty=float(empty.mean()),
        n_pairs=n,
        method=name,
        replacement=replacement,
        model_name=model.cfg.model_name,
        found_on=pairs.digests(model),
    )


def _batches(
    model, graph: CircuitGraph, metric: Any, runs: Sequence[tuple[Pairs, AblatedOf]]
) -> Iterator[tuple[Any, Tensor, Run]]:
    """Metric, clean tokens and ablated run of as many pairs as fit the memory at once."""
    for group, ablated_of in runs:
        n, n_pos = group.clean.shape
        at_once = pairs_at_once(model, graph, n_pos, current().memory) if isinstance(metric, ReadingMetric) else n
        for rows in chunks(n, at_once):
            with torch.no_grad():
                ablated = ablated_of(rows, None)
            yield of_pairs(group.of(metric), rows, n), group.clean[rows], ablated


def demo(model: HookedTransformer) -> EdgeScores:
    """Every edge's score on two short prompt pairs; token numbers where the model has no tokenizer."""
    return eap(model, demo_pairs(model, 2))


def demo_circuit(model: HookedTransformer, pairs: PromptPairs, through: str = "") -> Circuit:
    """The smallest circuit, of 4, 8, 16, ... edges, that reaches the logits through a node of such a name."""
    scores = eap(model, pairs)
    sizes = [2**i for i in range(2, 30) if 2**i < scores.graph.n_edges]
    circuits = (scores.greedy_edges(size) for size in (*sizes, scores.graph.n_edges))
    return next(circuit for circuit in circuits if any(through in name for name in circuit.nodes))
