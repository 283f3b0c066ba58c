"""Edge attribution with integrated gradients: gradients along a path from the ablated run to the clean one."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError
from hooklens.core.progress_bar import step
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.edge_attribution import Scored, edge_scores, scored
from hooklens.plugins.circuits.edge_scores import EdgeScores
from hooklens.plugins.circuits.graph import CircuitGraph
from hooklens.plugins.circuits.node_runs import Run, observe, walk
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.replacement import Value

#: Of each method: where in a step its gradient is taken, as a share of the step, and what is mixed (`_integral`).
_METHODS = {
    "EAP-IG": (0.0, "inputs"),
    "EAP-IG at midpoints": (0.5, "inputs"),
    "EAP-IG over activations": (1.0, "activations"),
    "EAP-IG over each edge's own source": (0.5, "own source"),
}


def eap_ig(
    model: HookedTransformer,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    steps: int = 10,
) -> EdgeScores:
    """Edge attribution with the gradient averaged over inputs between the corrupted and the clean prompt's embedding.

    Where the metric is flat at the clean run (a saturated softmax, an OR), plain gradients are 0; on the way to it they
    are not. Gradients are taken at 0/steps, 1/steps, ..., (steps - 1)/steps of the way, as in the authors' code. The
    path begins in the corrupted run, which is the only ablation; for others use `eap_ig_activations`.

    >>> from hooklens.testing import tiny_model
    >>> scores = eap_ig(tiny_model(), [[1, 2, 3]], [[1, 4, 3]], lambda logits: logits[:, -1, 5], steps=2)
    >>> scores.method
    'EAP-IG, 2 steps'

    Reference: Hanna et al. (2024), "Have Faith in Faithfulness", equation 4 and its code (EAP-IG over inputs).
    """
    return _integrated(model, as_pairs(model, clean, corrupted, metric), "corrupted", "EAP-IG", steps)


def eap_ig_midpoint(
    model: HookedTransformer,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    steps: int = 10,
) -> EdgeScores:
    """The integral of `eap_ig` by the midpoint rule: a quarter of the error at twice the steps, in place of half.

    >>> from hooklens.testing import tiny_model
    >>> scores = eap_ig_midpoint(tiny_model(), [[1, 2, 3]], [[1, 4, 3]], lambda logits: logits[:, -1, 5], steps=2)
    >>> scores.method
    'EAP-IG at midpoints, 2 steps'

    A variant of `eap_ig`, not a published method: the path is cut into `steps` equal parts and the gradient is taken in
    the middle of each.
    """
    return _integrated(model, as_pairs(model, clean, corrupted, metric), "corrupted", "EAP-IG at midpoints", steps)


def eap_ig_activations(
    model: HookedTransformer,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    value: Value = "corrupted",
    steps: int = 10,
) -> EdgeScores:
    """Edge attribution with the gradient averaged over runs in which one group of nodes is between ablated and clean.

    A group is the embedding, a layer's heads, or its MLP. In each run one group writes 1/steps, 2/steps, ..., all of
    the way from its ablated to its clean output, as a constant; everything before it is clean. Every edge of the model
    is scored in every run, and the mean is over all groups and steps.

    >>> from hooklens.testing import or_gate
    >>> metric = lambda logits: logits[:, -1, 1]
    >>> scores = eap_ig_activations(or_gate(), [[0]], None, metric, value="zero", steps=5)
    >>> [(row[0], round(row[1], 4)) for row in scores.table(3).rows]     # heads: open at 2 of 5 steps, 1 of 3 groups
    [('MLP0->logits', 1.0), ('L0H0->MLP0', 0.1333), ('L0H1->MLP0', 0.1333)]

    This works for every ablation. `eap_ig_own_source` scores an edge in the runs of its own source only.

    Reference: Hanna et al. (2024), "Have Faith in Faithfulness", section 3 and its code (EAP-IG over activations).
    """
    return _integrated(model, as_pairs(model, clean, corrupted, metric), value, "EAP-IG over activations", steps)


def eap_ig_own_source(
    model: HookedTransformer,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    value: Value = "corrupted",
    steps: int = 10,
) -> EdgeScores:
    """Edge attribution with each edge's gradient averaged between its own source's ablated and clean outputs.

    The edges that leave a layer's heads (or its MLP, or the embedding) get gradients from runs in which all of these
    write a mixture of their ablated and clean output. So the scores of edges that leave the last such group add up to
    the effect of ablating them.

    >>> from hooklens.testing import or_gate
    >>> scores = eap_ig_own_source(or_gate(), [[0]], None, lambda logits: logits[:, -1, 1], value="zero")
    >>> [(row[0], round(row[1], 4)) for row in scores.table(3).rows]
    [('MLP0->logits', 1.0), ('L0H0->MLP0', 0.5), ('L0H1->MLP0', 0.5)]

    A variant of `eap_ig_activations`, not a published method, with `steps` runs for each group of nodes, at the middle
    of each step.
    """
    pairs = as_pairs(model, clean, corrupted, metric)
    return _integrated(model, pairs, value, "EAP-IG over each edge's own source", steps)


def _integrated(model, pairs: PromptPairs, value: Value, name: str, steps: int) -> EdgeScores:
    """The scores by one of `_METHODS`, with gradients at `steps` points between ablated and clean output."""
    whole("steps", steps, 1)
    offset, over = _METHODS[name]
    if over == "inputs" and pairs.corrupted is None:
        raise InputError(
            "integrated gradients over inputs need the corrupted prompts at which they begin; "
            "eap_ig_activations(..., value='zero') does without"
        )
    shares = [(k + offset) / steps for k in range(steps)]
    return scored(model, pairs, value, f"{name}, {steps} steps", partial(_integral, shares=shares, over=over))


def _integral(
    model: Any, graph: CircuitGraph, metric: Any, clean: Tensor, ablated: Run, *, shares: list[float], over: str
) -> Scored:
    """Scores of a batch with gradients averaged over runs in which one group of nodes writes a mixture of its outputs.

    Over "inputs" that is the embedding, over "activations" each group in turn. Over "own source" each group in turn
    too, but an edge is scored in the runs of its own source only.
    """
    with torch.no_grad():
        live = observe(model, graph, clean)
    reader = Reader(model, metric, live.streams[-1])
    moved, own = live.nodes - ablated.nodes, over == "own source"
    total = moved.new_zeros(len(clean), graph.n_edges)
    none = torch.zeros(graph.n_sources, dtype=torch.bool)
    groups = _groups(graph)[: 1 if over == "inputs" else None]
    for kind, layer, sources in groups:
        away = moved[sources].sum(0)
        scored_sources = sources if own else slice(None)
        for share in shares:
            begin, shift = live.nodes[0], {(kind, layer): (share - 1) * away}
            if kind == "embed":
                begin, shift = begin + (share - 1) * away, {}
            run = walk(model, graph, begin.detach().requires_grad_(), none, shift=shift)
            total += edge_scores(reader, graph, run, moved[scored_sources], scored_sources)
            step(1 / (len(shares) * len(groups)))
    return total / (len(shares) * (1 if own else len(groups))), reader.base


def _groups(graph: CircuitGraph) -> list[tuple[str, int, slice]]:
    """Nodes that write together: the embedding, each layer's heads, each MLP."""
    groups = [("embed", 0, slice(0, 1))]
    for layer in range(graph.n_layers):
        groups.append(("attn", layer, graph.heads_at(layer)))
        if graph.mlp:
            at = graph.mlp_at(layer)
            groups.append(("mlp", layer, slice(at, at + 1)))
    return groups


def demo(model: HookedTransformer) -> EdgeScores:
    """Every edge's score on two short prompt pairs; token numbers where the model has no tokenizer."""
    return eap_ig(model, demo_pairs(model, 2), steps=4)
