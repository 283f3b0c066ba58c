"""Runs seen from the graph: what every node writes, in a run of the model and in the run that ablated edges carry."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.prompts import Pairs
from hooklens.model.kv_cache import Context
from hooklens.model.linear import is_plain
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.graph import CircuitGraph
from hooklens.sweeps.naive import why_plain
from hooklens.sweeps.replacement import Replacement, Target, Written, activations_of, are_prompts, targets_of

Stream = Float[Tensor, "pair pos d_model"]
Keyed = Float[Tensor, "pair pos kv_head d_head"]
Wanted = Bool[Tensor, "source"] | None


@dataclass(eq=False)
class Run:
    """One run seen from the graph: what the wanted nodes wrote, and the stream that each slot's receivers read.

    `tokens` and `past`, keys (turned by position) and values, are those of a run of the model: positions before its
    first difference can be reused. Where gradients are taken, `leaves` hold what those of each slot begin from, and
    `normed` the normalised stream of each layer's heads.
    """

    nodes: Float[Tensor, "source pair pos d_model"]
    streams: list[Stream]
    past: list[tuple[Keyed, Keyed]] = field(default_factory=list)
    tokens: Shaped[Tensor, "pair pos *d_in"] | None = None
    normed: list[Stream] = field(default_factory=list)
    leaves: list[tuple[Tensor, ...]] = field(default_factory=list)

    def part(self, rows: slice, wanted: Wanted = None) -> "Run":
        """The run of some pairs and of the wanted nodes (None: all); one row serves all pairs."""
        rows = slice(None) if self.nodes.shape[1] == 1 else rows
        nodes = self.nodes[:, rows] if wanted is None else self.nodes[:, rows][wanted]
        return Run(nodes, [stream[rows] for stream in self.streams])


#: The ablated run of some pairs of a group, with the outputs of some nodes (None: all).
AblatedOf = Callable[[slice, Wanted], Run]


def refuse(model: HookedTransformer) -> None:
    """Raise where hooks or dropout act on the model: edges are computed between its parts, which would pass them by."""
    why = why_plain(model)
    if why is not None:
        raise InputError(
            f"a circuit needs the model's own forward pass, but {why}; leave the `with` block, remove the hooks, or "
            "call model.eval() first"
        )


def observe(
    model: HookedTransformer, graph: CircuitGraph, tokens: Shaped[Tensor, "pair pos *d_in"], wanted: Wanted = None
) -> Run:
    """A plain run of the model, seen from the graph. The outputs of `wanted` nodes are kept (None: all)."""
    embedded = model(tokens, stop_at_layer=0)  # checks the token ids, which may come from a replacement
    return replace(walk(model, graph, embedded, wanted), tokens=tokens)


def walk(
    model: HookedTransformer,
    graph: CircuitGraph,
    x: Stream,
    wanted: Wanted = None,
    *,
    shift: Mapping[tuple[str, int], Stream] | None = None,
) -> Run:
    """Run from the embedding `x` on, with gradients if it requires them.

    `shift` adds something to what a layer's "attn" or "mlp" writes and makes that sum a constant: no gradient goes back
    through it.
    """
    ctx = Context(torch.arange(x.shape[1], device=x.device))
    wanted = torch.ones(graph.n_sources, dtype=torch.bool) if wanted is None else wanted
    shift, nodes = shift or {}, [x.detach()[None]] if wanted[0] else []
    run = Run(x.new_zeros(0, *x.shape), [])
    for layer, block in enumerate(model.blocks):
        attn, entered, normed = block.attn, x, block.before_attn(x)
        q, k, v = (attn.heads(linear, normed, None) for linear in (attn.q, attn.k, attn.v))
        run.streams.append(x)
        if x.requires_grad:
            run.normed.append(normed)
            run.leaves.append((q, k, v))
        q, k = attn.place(q, k, ctx)
        z = ctx.attend(attn, q, k, v)
        run.past.append((k, v))
        heads = wanted[graph.heads_at(layer)].nonzero().flatten()
        if len(heads):
            nodes.append(head_outputs(block, z.detach(), heads).detach())
        x = x + _shifted(block.attn_adds(attn.o(z.flatten(2))), shift.get(("attn", layer)))
        if block.mlp is None:
            continue
        read = entered if graph.parallel else x
        read = read.view_as(read)  # a node of its own: its gradient is that of the MLP's path alone
        run.streams.append(read)
        run.leaves += [(read,)] if x.requires_grad else []
        wrote = _shifted(mlp_output(block, read), shift.get(("mlp", layer)))
        if wanted[graph.mlp_at(layer)]:
            nodes.append(wrote.detach()[None])
        x = x + wrote
    leaves = [*run.leaves, (x,)] if x.requires_grad else []
    return replace(run, nodes=torch.cat(nodes) if nodes else run.nodes, streams=[*run.streams, x], leaves=leaves)


def _shifted(wrote: Stream, by: Stream | None) -> Stream:
    return wrote if by is None else wrote.detach() + by


def head_outputs(
    block: Any, z: Float[Tensor, "pair pos head d_head"], heads: Int[Tensor, "chosen"]
) -> Float[Tensor, "chosen pair pos d_model"]:
    """What each chosen head adds to the stream, without b_O, which only a norm behind attention mixes in."""
    attn, passage = block.attn, block.writes_through("attn")
    if passage.open:
        if is_plain(attn.o):
            some = len(heads) < attn.n_heads
            return torch.einsum("bphd,hdm->hbpm", *((z[:, :, heads], attn.W_O[heads]) if some else (z, attn.W_O)))
        return attn.results(z)[:, :, heads].permute(2, 0, 1, 3)
    raw = attn.o(z.flatten(2))
    results = attn.results(z)
    share = results + ((raw - results.sum(2)) / attn.n_heads)[:, :, None]
    return passage.scaled_as(share, raw[:, :, None])[:, :, heads].permute(2, 0, 1, 3).to(raw)


def mlp_output(block: Any, read: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair pos d_model"]:
    """What the MLP adds to the stream, biases included."""
    return block.mlp_adds(block.mlp(block.before_mlp(read)))


def attn_constant(block: Any) -> Float[Tensor, "1 1 d_model"]:
    """What attention adds beside the outputs of its heads: b_O, or the bias of a norm behind it."""
    attn, passage = block.attn, block.writes_through("attn")
    written = attn.o(next(attn.o.parameters()).new_zeros(1, 1, attn.n_heads * attn.d_head))
    return written if passage.open else passage.bias(written).expand_as(written)


def node_points(graph: CircuitGraph) -> list[str]:
    """The hook points that hold what nodes write: the embedding, every layer's heads, every MLP.

    In sandwich blocks a head writes its share of the normalised sum of all heads, not the result itself.
    """
    parts = ["attn.hook_result", *(["hook_mlp_out"] if graph.mlp else [])]
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.{part}" for i in range(graph.n_layers) for part in parts)]


def ablated_runs(
    model: HookedTransformer, graph: CircuitGraph, groups: Sequence[Pairs], replacement: Replacement
) -> Iterator[tuple[Pairs, AblatedOf]]:
    """For each group of pairs, the run whose values ablated edges carry: a function of rows and of wanted nodes.

    The run has one row where all pairs share it.
    """

    def read(tokens: Tensor) -> dict[str, Tensor]:
        nodes = observe(model, graph, tokens).nodes
        acts = [nodes[0]]
        for layer in range(graph.n_layers):
            acts.append(nodes[graph.heads_at(layer)].movedim(0, 2))
            acts += [nodes[graph.mlp_at(layer)]] if graph.mlp else []
        return dict(zip(points, acts, strict=True))

    points = node_points(graph)
    targets = targets_of(model, groups, points, read=read)
    for group, target, written in zip(groups, targets, replacement.once(targets), strict=True):
        if are_prompts(written, target.tokens):
            yield group, partial(_some_observed, model, graph, written)
        else:
            yield group, _run_of(model, graph, target, written).part


def _some_observed(model: HookedTransformer, graph: CircuitGraph, ids: Tensor, rows: slice, wanted: Wanted) -> Run:
    return observe(model, graph, ids[rows], wanted)


def _run_of(model: HookedTransformer, graph: CircuitGraph, target: Target, written: Written) -> Run:
    """The run in which every node writes the given values; streams are their sums, and constants of no node."""
    own = target.read(target.tokens if callable(written) else target.tokens[:1])
    if isinstance(written, Mapping) and not _same_for_all(written, own):
        own = {name: act.expand(len(target.tokens), *act.shape[1:]) for name, act in own.items()}
    given = activations_of(written, own).values()
    by_node = [act.movedim(2, 0) if act.ndim == 4 else act[None] for act in given]  # head pos d or pos d
    nodes = torch.cat(by_node)
    stream, streams, beside = nodes[0], [], torch.zeros_like(nodes[0])
    for slot in graph.slots[:-1]:
        streams.append(stream)
        if slot.kind == "mlp":
            stream = stream + beside + nodes[graph.mlp_at(slot.layer)]
            continue
        heads = nodes[graph.heads_at(slot.layer)].sum(0) + attn_constant(model.blocks[slot.layer]).to(stream)
        if graph.parallel and graph.mlp:  # its MLP reads what its attention read
            beside = heads
        else:
            stream = stream + heads
    return Run(nodes, [*streams, stream])


def _same_for_all(written: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Do the written values have one row for every pair?"""
    shapes = [(torch.as_tensor(value).shape, own[name].ndim) for name, value in written.items() if name in own]
    return all(len(shape) < n or shape[0] == 1 for shape, n in shapes)
