"""The gradient of a metric by what every receiver reads, and with it a score for every edge at once."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.errors import InputError
from hooklens.model.linear import is_plain
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.graph import CircuitGraph, Slot
from hooklens.plugins.circuits.node_runs import Run, Stream
from hooklens.sweeps.measure import Reader


def edge_gradients(
    model: HookedTransformer, graph: CircuitGraph, run: Run, values: Float[Tensor, "pair"], *, after: int = -1
) -> Iterator[tuple[Slot, Float[Tensor, "pair receiver pos d_model"]]]:
    """The gradient of the summed values by each receiver's own input, slot by slot; those that read a node `after`."""
    slots = [i for i, slot in enumerate(graph.slots) if slot.columns > after]
    leaves = [leaf for i in slots for leaf in run.leaves[i]]
    grads = iter(torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True))
    for i in slots:
        slot, own = graph.slots[i], [next(grads) for _ in run.leaves[i]]
        if slot.kind != "attn":
            yield slot, own[0][:, None]
            continue
        block, normed = model.blocks[slot.layer], run.normed[slot.layer].detach()
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
        each = [torch.autograd.grad(out[:, :, h], x, grad[:, :, h], retain_graph=True)[0] for h in range(n)]
    return torch.stack(each, 1)


def _through_norm(block: Any, x: Stream, grad: Tensor) -> Float[Tensor, "pair receiver pos d_model"]:
    """Every receiver has the norm on its own path: the same stream, a gradient of its own."""
    if block.reads_through("attn").norm is None:
        return grad
    with torch.enable_grad():
        copies = x[:, None].expand_as(grad).detach().requires_grad_()
        return torch.autograd.grad(block.quiet_norm(copies), copies, grad)[0]


def edge_scores(
    graph: CircuitGraph,
    slot_grads: Iterator[tuple[Slot, Tensor]],
    moved: Float[Tensor, "source pair pos d_model"],
    sources: slice = slice(None),
) -> Float[Tensor, "pair edge"]:
    """Gradient times what an edge carries beyond the ablated run, summed over positions; 0 for other sources' edges.

    `moved` holds the nodes that `sources` names.
    """
    first = sources.start or 0
    by_pair = moved.transpose(0, 1).flatten(2)  # pair source (pos d_model)
    out = by_pair.new_zeros(len(by_pair), graph.n_edges)
    for slot, grad in slot_grads:
        seen = min(slot.columns, first + len(moved)) - first
        if seen > 0:
            block = graph.block(out, slot)
            block[:, :, first : first + seen] = grad.flatten(2) @ by_pair[:, :seen].mT
    return out


def differentiable_values(reader: Reader, stream: Stream) -> Float[Tensor, "pair"]:
    """The metric of the stream that leaves the last block, in the autograd graph."""
    values = reader.in_graph(stream)
    if not values.requires_grad:
        raise InputError(
            "attribution differentiates the metric, and this one returned a value without a gradient; return a tensor "
            "computed from the logits (no .item(), no argmax), or use exact edge patching"
        )
    return values


def pairs_at_once(model: HookedTransformer, graph: CircuitGraph, n_pos: int, memory: int) -> int:
    """How many pairs fit: every node's output twice, a layer's gradients, and what autograd keeps."""
    cfg = model.cfg
    receivers = graph.n_heads + 2 * graph.n_kv_heads
    kept = cfg.n_layers * (8 * cfg.d_model + 5 * cfg.d_mlp)
    a_position = ((2 * graph.n_sources + 4 * receivers) * cfg.d_model + kept) * model.dtype.itemsize
    return max(1, memory // (a_position * n_pos))
