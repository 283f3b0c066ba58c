"""Edge attribution patching: a score for every edge of the model from two forward passes and one backward."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.gradients import need_gradients
from hooklens.core.progress_bar import Advance, progress, within
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.edge_scores import EdgeScores
from hooklens.plugins.circuits.gradient_pass import (
    differentiable_values,
    edge_gradients,
    edge_scores,
    pairs_at_once,
    reads_of,
    trace,
)
from hooklens.plugins.circuits.graph import CircuitGraph, circuit_graph
from hooklens.plugins.circuits.node_runs import Run, ablated_runs, embedded, refuse
from hooklens.plugins.circuits.run import aligned_pairs, chunks, of_pairs
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.replacement import Value, as_replacement
from hooklens.sweeps.settings import current

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

#: Of a batch: every pair's edge scores, and the metric of the clean run.
Scored = tuple[Float[Tensor, "pair edge"], Float[Tensor, "pair"]]


def eap(
    model: "HookedTransformer",
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
    pairs = as_pairs(model, clean, corrupted, metric)
    return scored(model, pairs, value=value, name="EAP", one_batch=_clean_gradient)


def _clean_gradient(model, graph: CircuitGraph, metric: Any, clean: Tensor, ablated: Run) -> Scored:
    nodes = [embedded(model, clean)[None]]
    made = trace(model, graph, nodes[0][0], nodes=nodes)
    reader = Reader(model, metric, made.final.detach())
    gradients = edge_gradients(model, made, differentiable_values(reader, made.final))
    return edge_scores(graph, gradients, torch.cat(nodes) - ablated.nodes), reader.base


def scored(
    model: "HookedTransformer", pairs: PromptPairs, value: Value, name: str, one_batch: Callable[..., Scored]
) -> EdgeScores:
    """The scores that a method finds, batch by batch."""
    need_gradients(name)
    refuse(model)
    graph, replacement = circuit_graph(model), as_replacement(value)
    groups = aligned_pairs(model, pairs, replacement)
    n = len(pairs)
    parts: list[tuple[Tensor, ...]] = []
    with progress(name, n, unit="pairs") as advance:
        with torch.no_grad():
            ablated = list(ablated_runs(model, graph, groups, replacement))
        for group, of_rows in ablated:
            parts += _batches(
                model, graph, group=group, metric=pairs.metric, ablated_of=of_rows, one_batch=one_batch, advance=advance
            )
    whole, empty = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    total, squares = (torch.stack([part[i] for part in parts]).sum(0) for i in (2, 3))
    mean = total / n
    spread = (squares / n - mean.square()).clamp_min(0) * n / (n - 1) if n > 1 else torch.full_like(mean, torch.nan)
    if not bool(mean.isfinite().all()):
        raise InputError("some edge's score is not finite: the metric or its gradient is not; try hooklens check")
    return EdgeScores(
        graph=graph,
        scores=mean,
        std_error=(spread / n).sqrt(),
        base=float(whole.mean()),
        empty=float(empty.mean()),
        n_pairs=n,
        method=name,
        replacement=replacement,
        model_name=model.cfg.model_name,
        found_on=pairs.digests(model),
    )


def _batches(
    model,
    graph: CircuitGraph,
    group: Pairs,
    metric: Any,
    ablated_of: Callable[[slice], Run],
    one_batch: Callable[..., Scored],
    advance: Advance,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of every batch: the metric of the model and of the ablated run, the sum of scores and of their squares."""
    metric, n = group.of(metric), len(group.index)
    at_once = pairs_at_once(model, graph, group.clean.shape[1], current().memory) if reads_of(metric) else n
    for rows in chunks(n, at_once):
        clean, here = group.clean[rows], of_pairs(metric, rows, n)
        with torch.no_grad():
            ablated = ablated_of(rows)
            empty = Reader(model, here, ablated.streams[-1].expand(len(clean), -1, -1)).base
        with torch.enable_grad(), within(advance, len(clean), 1):  # methods of several steps tell which share is done
            found, base = one_batch(model, graph, here, clean, ablated)
        yield base, empty, found.detach().sum(0), found.detach().square().sum(0)


def demo(model: "HookedTransformer") -> EdgeScores:
    """Every edge's score on two short prompt pairs; token numbers where the model has no tokenizer."""
    return eap(model, demo_pairs(model, 2))


def demo_circuit(model: "HookedTransformer", pairs: PromptPairs) -> Circuit:
    """The smallest circuit, of 4, 8, 16, ... edges, that reaches from the embedding to the logits."""
    scores = eap(model, pairs)
    sizes = [2**i for i in range(2, 30) if 2**i < scores.graph.n_edges]
    circuits = (scores.greedy_edges(size) for size in (*sizes, scores.graph.n_edges))
    return next(circuit for circuit in circuits if circuit.n_edges)
