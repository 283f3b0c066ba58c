"""What every node writes in a run, and the three runs that ablated edges can carry."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.errors import InputError, did_you_mean
from hooklens.model.kv_cache import Context
from hooklens.model.linear import is_plain
from hooklens.plugins.circuits.graph import CircuitGraph
from hooklens.sweeps.naive import why_plain

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

#: What a cut edge carries: the corrupted run's value, nothing, or the mean over the corrupted prompts.
ABLATIONS = ("corrupted", "zero", "mean")
Keyed = Float[Tensor, "pair pos kv_head d_head"]


@dataclass(eq=False)
class Run:
    """One run seen from the graph: what the wanted nodes wrote, and the stream that each group of receivers read.

    `past` holds keys (turned by position) and values, where positions before the first difference can be reused.
    """

    nodes: Float[Tensor, "source pair pos d_model"]
    streams: list[Float[Tensor, "pair pos d_model"]]
    past: list[tuple[Keyed, Keyed]]


def refuse(model: "HookedTransformer") -> None:
    """Edges are worked out between the model's parts; whoever else acts on these would be passed over."""
    why = why_plain(model)
    if why is not None:
        raise InputError(
            f"a circuit needs the model's own forward pass, but {why}; leave the `with` block, remove the hooks, or "
            "call model.eval() first"
        )


def check_ablation(ablation: str) -> None:
    if ablation not in ABLATIONS:
        raise did_you_mean("ablation", ablation, ABLATIONS)


def embedded(model: "HookedTransformer", tokens: Int[Tensor, "pair pos"]) -> Float[Tensor, "pair pos d_model"]:
    """What the embedding node writes: tokens and positions."""
    with torch.no_grad():
        return model.embed_input(tokens, Context(torch.arange(tokens.shape[1], device=tokens.device)))


def observe(
    model: "HookedTransformer",
    graph: CircuitGraph,
    tokens: Int[Tensor, "pair pos"],
    wanted: Bool[Tensor, "source"] | None = None,
) -> Run:
    """A plain run of the model, seen from the graph. `wanted` nodes' outputs are kept (None: all)."""
    ctx = Context(torch.arange(tokens.shape[1], device=tokens.device))
    x = model.embed_input(tokens, ctx)
    wanted = torch.ones(graph.n_sources, dtype=torch.bool) if wanted is None else wanted
    nodes, streams, past = [x[None]] if wanted[0] else [], [], []
    for layer, block in enumerate(model.blocks):
        attn = block.attn
        streams.append(x)
        normed = block.before_attn(x)
        q, k, v = (attn.heads(linear, normed, None) for linear in (attn.q, attn.k, attn.v))
        q, k = attn.place(q, k, ctx)
        z = ctx.attend(attn, q, k, v)
        past.append((k, v))
        heads = wanted[graph.heads_at(layer)].nonzero().flatten()
        if len(heads):
            nodes.append(head_outputs(block, z, heads))
        mid = x + block.attn_adds(attn.o(z.flatten(2)))
        if block.mlp is None:
            x = mid
            continue
        read = x if graph.parallel else mid
        streams.append(read)
        wrote = mlp_output(block, read)
        if wanted[graph.mlp_at(layer)]:
            nodes.append(wrote[None])
        x = mid + wrote
    written = torch.cat(nodes) if nodes else x.new_zeros(0, *x.shape)
    return Run(written, [*streams, x], past)


def head_outputs(
    block: Any, z: Float[Tensor, "pair pos head d_head"], heads: Int[Tensor, "chosen"]
) -> Float[Tensor, "chosen pair pos d_model"]:
    """What each chosen head adds to the stream; b_O is nobody's, but a norm behind attention mixes it in."""
    attn, passage = block.attn, block.writes_through("attn")
    if passage.open:
        if is_plain(attn.o):
            some = len(heads) < attn.n_heads
            return torch.einsum("bphd,hdm->hbpm", *((z[:, :, heads], attn.W_O[heads]) if some else (z, attn.W_O)))
        return attn.results(z)[:, :, heads].permute(2, 0, 1, 3)
    raw = attn.o(z.flatten(2))
    each = attn.results(z)
    share = each + ((raw - each.sum(2)) / attn.n_heads)[:, :, None]
    return passage.scaled_as(share, raw[:, :, None])[:, :, heads].permute(2, 0, 1, 3).to(raw)


def mlp_output(block: Any, read: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair pos d_model"]:
    """What the MLP adds to the stream, biases included."""
    return block.mlp_adds(block.mlp(block.before_mlp(read)))


def attn_constant(block: Any) -> Float[Tensor, "1 1 d_model"]:
    """What attention adds that no head wrote: b_O, or the bias of a norm behind it."""
    attn, passage = block.attn, block.writes_through("attn")
    written = attn.o(next(attn.o.parameters()).new_zeros(1, 1, attn.n_heads * attn.d_head))
    return written if passage.open else passage.bias(written).expand_as(written)


def ablated_run(
    model: "HookedTransformer",
    graph: CircuitGraph,
    tokens: Int[Tensor, "pair pos"],
    ablation: str,
    wanted: Bool[Tensor, "source"] | None = None,
) -> Run:
    """The run whose values ablated edges carry. For "zero" and "mean" it has one row, which serves every pair."""
    if ablation == "corrupted":
        return observe(model, graph, tokens, wanted)
    if ablation == "mean":
        return _mean_run(model, graph, tokens, wanted)
    x = embedded(model, tokens[:1])
    stream, streams = torch.zeros_like(x), []
    for slot in graph.slots[:-1]:
        streams.append(stream)
        if slot.kind == "attn" and not graph.parallel:
            stream = stream + attn_constant(model.blocks[slot.layer]).to(x)
        if graph.parallel and (slot.kind == "mlp" or not graph.mlp):
            stream = stream + attn_constant(model.blocks[slot.layer]).to(x)
    n = graph.n_sources if wanted is None else int(wanted.sum())
    return Run(x.new_zeros(n, *x.shape), [*streams, stream], [])


def _mean_run(
    model: "HookedTransformer", graph: CircuitGraph, tokens: Int[Tensor, "pair pos"], wanted: Tensor | None
) -> Run:
    if len(tokens) < 2:
        raise InputError(
            "ablation='mean' is the mean over the corrupted prompts of one length, and there is one such prompt; give "
            "more of them, or ablation='corrupted'"
        )
    total: Run | None = None
    for row in tokens:
        one = observe(model, graph, row[None], wanted)
        if total is None:
            total = Run(one.nodes, one.streams, [])
        else:
            total.nodes += one.nodes
            total.streams = [a + b for a, b in zip(total.streams, one.streams, strict=True)]
    assert total is not None
    return Run(total.nodes / len(tokens), [stream / len(tokens) for stream in total.streams], [])
