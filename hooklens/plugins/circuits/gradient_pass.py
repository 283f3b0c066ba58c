"""The gradient of a metric by what every receiver reads, and with it a score for every edge at once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.errors import InputError
from hooklens.model.kv_cache import Context
from hooklens.model.linear import is_plain
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.graph import CircuitGraph, Slot
from hooklens.plugins.circuits.node_runs import head_outputs, mlp_output
from hooklens.sweeps.measure import Reader

Stream = Float[Tensor, "pair pos d_model"]


@dataclass(eq=False)
class Trace:
    """A run in the autograd graph: per slot the stream that its receivers read, and what their gradients start from."""

    final: Stream
    read: dict[Slot, Stream] = field(default_factory=dict)
    normed: dict[Slot, Stream] = field(default_factory=dict)
    leaves: dict[Slot, tuple[Tensor, ...]] = field(default_factory=dict)


def trace(
    model: HookedTransformer,
    graph: CircuitGraph,
    x: Stream,
    *,
    nodes: list[Tensor] | None = None,
    shift: dict[tuple[str, int], Stream] | None = None,
) -> Trace:
    """Run with gradients from the embedding `x` on.

    What each node writes is added to `nodes` where a list is given. `shift` adds something to what a layer's "attn" or
    "mlp" writes and makes that sum a constant: no gradient goes back through it.
    """
    made, shift = Trace(x), shift or {}
    ctx = Context(torch.arange(x.shape[1], device=x.device))
    slots = {(slot.kind, slot.layer): slot for slot in graph.slots}
    x = x.detach().requires_grad_()
    for layer, block in enumerate(model.blocks):
        entered = x
        x = x + _shifted(
            _attention(block, slots["attn", layer], x=x, ctx=ctx, made=made, nodes=nodes), shift.get(("attn", layer))
        )
        if graph.mlp:
            slot = slots["mlp", layer]
            read = entered if graph.parallel else x
            own = read.view_as(read)  # a node of its own: its gradient is that of the MLP's path alone
            made.read[slot], made.leaves[slot] = read.detach(), (own,)
            wrote = _shifted(mlp_output(block, own), shift.get(("mlp", layer)))
            x = x + wrote
            if nodes is not None:
                nodes.append(wrote.detach()[None])
    made.final = x
    made.read[graph.slots[-1]], made.leaves[graph.slots[-1]] = x.detach(), (x,)
    return made


def _shifted(wrote: Stream, by: Stream | None) -> Stream:
    return wrote if by is None else wrote.detach() + by


def _attention(block: Any, slot: Slot, x: Stream, ctx: Context, made: Trace, nodes: list[Tensor] | None) -> Stream:
    attn, normed = block.attn, block.before_attn(x)
    q, k, v = (attn.heads(linear, normed, None) for linear in (attn.q, attn.k, attn.v))
    made.read[slot], made.normed[slot], made.leaves[slot] = x.detach(), normed.detach(), (q, k, v)
    turned = attn.place(q, k, ctx)
    z = ctx.attend(attn, turned[0], turned[1], v)
    if nodes is not None:
        nodes.append(head_outputs(block, z.detach(), torch.arange(attn.n_heads)).detach())
    return block.attn_adds(attn.o(z.flatten(2)))


def edge_gradients(
    model: HookedTransformer, made: Trace, values: Float[Tensor, "pair"], *, after: int = -1
) -> Iterator[tuple[Slot, Float[Tensor, "pair receiver pos d_model"]]]:
    """The gradient of the summed values by each receiver's own input, slot by slot; those that read a node `after`."""
    kept = {slot: group for slot, group in made.leaves.items() if slot.columns > after}
    leaves = [leaf for group in kept.values() for leaf in group]
    grads = iter(torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True))
    for slot, group in kept.items():
        own = [next(grads) for _ in group]
        if slot.kind != "attn":
            yield slot, own[0][:, None]
            continue
        block = model.blocks[slot.layer]
        linears = (block.attn.q, block.attn.k, block.attn.v)
        back = [_through(linear, made.normed[slot], g) for linear, g in zip(linears, own, strict=True)]
        yield slot, _through_norm(block, made.read[slot], torch.cat(back, 1))


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
    metric, rows = reader.metric, torch.arange(len(stream), device=stream.device)
    if reader.read is not None:
        value = metric.on_read(reader.logits(stream[rows[:, None], reader.read], rows))
    else:
        logits = reader.model.read_out(stream)
        each = [metric(logits[i : i + 1]).reshape(()) for i in rows] if reader.by_pair else []
        value = torch.stack(each) if each else metric(logits)
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise InputError(
            "attribution differentiates the metric, and this one returned a value without a gradient; return a tensor "
            "computed from the logits (no .item(), no argmax), or use exact edge patching"
        )
    return value.reshape(-1)


def pairs_at_once(model: HookedTransformer, graph: CircuitGraph, n_pos: int, memory: int) -> int:
    """How many pairs fit: every node's output twice, a layer's gradients, and what autograd keeps."""
    cfg = model.cfg
    receivers = graph.n_heads + 2 * graph.n_kv_heads
    kept = cfg.n_layers * (8 * cfg.d_model + 5 * cfg.d_mlp)
    a_position = ((2 * graph.n_sources + 4 * receivers) * cfg.d_model + kept) * model.dtype.itemsize
    return max(1, memory // (a_position * n_pos))
