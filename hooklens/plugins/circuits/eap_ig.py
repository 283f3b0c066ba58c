"""Edge attribution with integrated gradients: gradients along a path from the ablated run to the clean one."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.prompts import Prompts
from hooklens.plugins.circuits.eap import Scored, demo_pairs, scored
from hooklens.plugins.circuits.gradients import differentiable_values, edge_gradients, edge_scores, trace
from hooklens.plugins.circuits.graph import CircuitGraph
from hooklens.plugins.circuits.nodes import Run, observe
from hooklens.plugins.circuits.scores import EdgeScores
from hooklens.progress import step
from hooklens.sweeps.measure import Reader

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def eap_ig(
    model: "HookedTransformer", clean: Prompts, corrupted: Prompts | None, metric: Any, *, steps: int = 10
) -> EdgeScores:
    """Edge attribution with the gradient averaged over inputs between the corrupted and the clean prompt's embedding.

    Where the metric is flat at the clean run (a saturated softmax, an OR), plain gradients see nothing; on the way
    there they do. The path is cut into `steps` equal parts and the gradient is taken in the middle of each. It ends in
    the corrupted run, so that only the corrupted run is ablated with; for other ablations use `eap_ig_activations`.

    >>> from hooklens.testing import tiny_model
    >>> scores = eap_ig(tiny_model(), [[1, 2, 3]], [[1, 4, 3]], lambda logits: logits[:, -1, 5], steps=2)
    >>> scores.method
    'EAP-IG, 2 steps'

    Reference: Hanna et al. (2024), "Have Faith in Faithfulness", equation 4 (there with the ends of the parts).
    """
    _check(steps)
    if corrupted is None:
        raise InputError(
            "integrated gradients over inputs need the corrupted prompts at which they begin; "
            "eap_ig_activations(..., ablation='zero') does without"
        )
    name = f"EAP-IG, {steps} steps"
    return scored(model, clean, corrupted, metric, "corrupted", name, partial(_over_inputs, steps))


def _over_inputs(steps: int, model, graph: CircuitGraph, metric: Any, clean: Tensor, ablated: Run) -> Scored:
    with torch.no_grad():
        live = observe(model, graph, clean)
    reader = Reader(model, metric, live.streams[-1])
    moved, begin = live.nodes - ablated.nodes, ablated.nodes[0]
    total: Tensor | float = 0.0
    for share in _middles(steps):
        made = trace(model, graph, begin + share * moved[0])
        gradients = edge_gradients(model, made, differentiable_values(reader, made.final))
        total = total + edge_scores(graph, gradients, moved)
        step(1 / steps)
    assert isinstance(total, Tensor)
    return total / steps, reader.base


def eap_ig_activations(
    model: "HookedTransformer",
    clean: Prompts,
    corrupted: Prompts | None,
    metric: Any,
    *,
    ablation: str = "corrupted",
    steps: int = 10,
) -> EdgeScores:
    """Edge attribution with the gradient averaged between a layer's ablated and clean outputs, layer by layer.

    The edges that leave a layer's heads (or its MLP, or the embedding) get gradients from runs in which all of these
    write a mixture of their ablated and clean output; everything after them is live. That is `steps` runs for each
    such group of nodes, and it works with every ablation.

    >>> from hooklens.testing import or_gate
    >>> scores = eap_ig_activations(or_gate(), [[0]], None, lambda logits: logits[:, -1, 1], ablation="zero")
    >>> [(row[0], round(row[1], 4)) for row in scores.table(3).rows]
    [('MLP0->logits', 1.0), ('L0H0->MLP0', 0.5), ('L0H1->MLP0', 0.5)]

    Reference: Hanna et al. (2024), "Have Faith in Faithfulness", section 3 and its code (EAP-IG over activations).
    """
    _check(steps)
    name = f"EAP-IG over activations, {steps} steps"
    return scored(model, clean, corrupted, metric, ablation, name, partial(_over_activations, steps))


def _over_activations(steps: int, model, graph: CircuitGraph, metric: Any, clean: Tensor, ablated: Run) -> Scored:
    with torch.no_grad():
        live = observe(model, graph, clean)
    reader = Reader(model, metric, live.streams[-1])
    moved = live.nodes - ablated.nodes
    total = moved.new_zeros(len(clean), graph.n_edges)
    groups = _groups(graph)
    for sources, layer, mid in groups:
        stream, away = _entry(graph, live, layer, mid), moved[sources].sum(0)
        for share in _middles(steps):
            made = trace(model, graph, stream - (1 - share) * away, layer, mid=mid)
            gradients = edge_gradients(model, made, differentiable_values(reader, made.final))
            total += edge_scores(graph, gradients, moved[sources], sources) / steps
            step(1 / (steps * len(groups)))
    return total, reader.base


def _groups(graph: CircuitGraph) -> list[tuple[slice, int, bool]]:
    """Nodes that write together, the layer whose stream first holds their sum, and whether that is mid-layer."""
    found = [(slice(0, 1), 0, False)]
    for layer in range(graph.n_layers):
        mid = graph.mlp and not graph.parallel
        found.append((graph.heads_at(layer), layer if mid else layer + 1, mid))
        if graph.mlp:
            at = graph.mlp_at(layer)
            found.append((slice(at, at + 1), layer + 1, False))
    return found


def _entry(graph: CircuitGraph, live: Run, layer: int, mid: bool) -> Tensor:
    """The clean stream that enters a layer, or that leaves its attention."""
    if layer == graph.n_layers:
        return live.streams[-1]
    kinds = [(slot.kind, slot.layer) for slot in graph.slots]
    return live.streams[kinds.index(("mlp" if mid else "attn", layer))]


def _middles(steps: int) -> list[float]:
    return [(k + 0.5) / steps for k in range(steps)]


def _check(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is a whole number of at least 1, got {steps!r}")


def demo(model: "HookedTransformer") -> EdgeScores:
    """Every edge's score on two short prompt pairs; token numbers where the model has no tokenizer."""
    clean, corrupted, metric = demo_pairs(model)
    return eap_ig(model, clean, corrupted, metric, steps=4)
