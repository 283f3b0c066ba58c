"""Edge attribution patching: a score for every edge of the model from two forward passes and one backward."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.errors import InputError
from hooklens.core.gradients import need_gradients
from hooklens.core.progress_bar import progress, within
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts
from hooklens.model.linear import is_plain
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.edge_scores import EdgeScores
from hooklens.plugins.circuits.graph import CircuitGraph, Slot, circuit_graph
from hooklens.plugins.circuits.node_runs import AblatedOf, Run, Stream, ablated_runs, refuse, walk
from hooklens.plugins.circuits.run import aligned_pairs, batches
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
    return edge_scores(reader, graph, run, run.nodes - ablated.nodes), reader.base


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
            with torch.enable_grad(), within(advance, len(clean), 1):  # a method of several steps moves the bar
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
        at_once = _pairs_at_once(model, graph, group.clean.shape[1], current().memory)
        for rows, of_rows in batches(group, metric, at_once):
            with torch.no_grad():
                ablated = ablated_of(rows, None)
            yield of_rows, group.clean[rows], ablated


# -- gradients by what every receiver reads


def edge_scores(
    reader: Reader,
    graph: CircuitGraph,
    run: Run,
    moved: Float[Tensor, "source pair pos d_model"],
    sources: slice = slice(None),
) -> Float[Tensor, "pair edge"]:
    """Gradient times what an edge carries beyond the ablated run, summed over positions; 0 for other sources' edges.

    `moved` holds the nodes that `sources` names.
    """
    first = sources.start or 0
    by_pair = moved.transpose(0, 1).flatten(2)  # pair source (pos d_model)
    scores = by_pair.new_zeros(len(by_pair), graph.n_edges)
    for slot, grad in _edge_gradients(reader, graph, run, after=-1 if sources.start is None else first):
        seen = min(slot.columns, first + len(moved)) - first
        block = graph.block(scores, slot)
        block[:, :, first : first + seen] = grad.flatten(2) @ by_pair[:, :seen].mT
    return scores


def _edge_gradients(
    reader: Reader, graph: CircuitGraph, run: Run, *, after: int
) -> Iterator[tuple[Slot, Float[Tensor, "pair receiver pos d_model"]]]:
    """The gradient of the metric by each receiver's own input, slot by slot; those that read a node `after`."""
    values = reader.in_graph(run.streams[-1])
    if not values.requires_grad:
        raise InputError(
            "attribution differentiates the metric, and this one returned a value without a gradient; return a tensor "
            "computed from the logits (no .item(), no argmax), or use exact edge patching"
        )
    slots = [i for i, slot in enumerate(graph.slots) if slot.columns > after]
    leaves = [leaf for i in slots for leaf in run.leaves[i]]
    grads = iter(torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True))
    for i in slots:
        slot, own = graph.slots[i], [next(grads) for _ in run.leaves[i]]
        if slot.kind != "attn":
            yield slot, own[0][:, None]
            continue
        block, normed = reader.model.blocks[slot.layer], run.normed[slot.layer].detach()
        linears = (block.attn.q, block.attn.k, block.attn.v)
        back = [_through(linear, normed, grad) for linear, grad in zip(linears, own, strict=True)]
        yield slot, _through_norm(block, run.streams[i].detach(), torch.cat(back, 1))


def _through(
    linear: nn.Module, normed: Stream, grad: Float[Tensor, "pair pos head d_head"]
) -> Float[Tensor, "pair head pos d_model"]:
    """Each head's gradient by the normalised stream, back through its part of a projection."""
    n, d = grad.shape[2:]
    if is_plain(linear):
        return torch.einsum("bphd,hdm->bhpm", grad, linear.weight.detach().unflatten(0, (n, d)))
    with torch.enable_grad():
        x = normed.clone().requires_grad_()
        out = linear(x).unflatten(-1, (n, d))
        gradients = [torch.autograd.grad(out[:, :, h], x, grad[:, :, h], retain_graph=True)[0] for h in range(n)]
    return torch.stack(gradients, 1)


def _through_norm(block: Any, x: Stream, grad: Tensor) -> Float[Tensor, "pair receiver pos d_model"]:
    """Every receiver has the norm on its own path: the same stream, a gradient of its own."""
    if block.reads_through("attn").norm is None:
        return grad
    with torch.enable_grad():
        copies = x[:, None].expand_as(grad).detach().requires_grad_()
        return torch.autograd.grad(block.quiet_norm(copies), copies, grad)[0]


def _pairs_at_once(model: HookedTransformer, graph: CircuitGraph, n_pos: int, memory: int) -> int:
    """How many pairs fit: every node's output twice, a layer's gradients, and what autograd keeps."""
    cfg = model.cfg
    receivers = graph.n_heads + 2 * graph.n_kv_heads
    kept = cfg.n_layers * (8 * cfg.d_model + 5 * cfg.d_mlp)
    a_position = ((2 * graph.n_sources + 4 * receivers) * cfg.d_model + kept) * model.dtype.itemsize
    return max(1, memory // (a_position * n_pos))


def demo(model: HookedTransformer) -> EdgeScores:
    """Every edge's score on two short prompt pairs; token numbers where the model has no tokenizer."""
    return eap(model, demo_pairs(model, 2))


def demo_circuit(model: HookedTransformer, pairs: PromptPairs, through: str = "") -> Circuit:
    """The smallest circuit, of 4, 8, 16, ... edges, that reaches the logits through a node of such a name."""
    scores = eap(model, pairs)
    sizes = [2**i for i in range(2, 30) if 2**i < scores.graph.n_edges]
    circuits = (scores.greedy_edges(size) for size in (*sizes, scores.graph.n_edges))
    return next(circuit for circuit in circuits if any(through in name for name in circuit.nodes))
