"""Rows of a path-patching sweep: what their receivers read, where they join the base run, and how they go on live."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.hooks import HookFn
from hooklens.model.kv_cache import Context, View
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.paths import EDGES, FIXED, FIXED_FROZEN, PathPlan, heads_write, receiver_heads, sent, writing
from hooklens.sweeps.protocol import Item
from hooklens.sweeps.rows import Group, PackedContext, merge, pack, through, unpack

Flat = Float[Tensor, "cell d_model"]
Index = Int[Tensor, "cell"]
Edits = list[tuple[Any, HookFn]]


@dataclass(eq=False)
class Cells:
    """The positions of all items that can change, end to end: one row a position. `first` is where each item begins."""

    first: Int[Tensor, "item"]
    pair: Index
    pos: Index
    senders: list[tuple[Any, slice]]

    def of(self, group: Group, at: Int[Tensor, "row pos"] | None = None) -> Index:
        """The cells of a group's rows, at all its positions or at those (counted from its start)."""
        at = torch.arange(group.x.shape[1], device=self.pair.device) if at is None else at
        return (self.first[group.item][:, None] + at).flatten()


def cells_of(plan: PathPlan, items: Sequence[Item], where: Sequence[Int[Tensor, "_"]]) -> Cells:
    """Cells of items, each at its own positions; neighbours of one sender are worked on together."""
    device = plan.tokens.device
    lengths = torch.tensor([len(positions) for positions in where], device=device)
    ends = lengths.cumsum(0)
    pair = torch.tensor([item.pair for item in items], device=device).repeat_interleave(lengths)
    senders: list[tuple[Any, slice]] = []
    for item, end, length in zip(items, ends.tolist(), lengths.tolist(), strict=True):
        sender = plan.senders[item.patch]
        same = bool(senders) and senders[-1][0] == sender
        begin = senders.pop()[1].start if same else end - length
        senders.append((sender, slice(begin, end)))
    return Cells(ends - lengths, pair, torch.cat(list(where)), senders)


class Live:
    """`edges`: a receiver reads the live stream, in which the sender has its new value."""

    def __init__(self, plan: PathPlan, cells: Cells):
        self.plan, self.cells = plan, cells
        self.change = torch.cat([sent(plan, s, cells.pair[at], cells.pos[at]) for s, at in cells.senders])

    def where(self, kind: str, layer: int, index: Index) -> Bool[Tensor, "cell head"] | None:
        """Which receivers of a kind read at these cells; None: all of them, everywhere."""
        where = self.plan.where(kind, layer)
        return None if where is None else where[self.cells.pair[index], self.cells.pos[index]]

    def mlp(self, layer: int, stream: Flat, index: Index) -> Flat:
        """What the MLP of a layer reads: at the receiver's positions what it is patched with, elsewhere the stream."""
        return self._at("mlp_in", layer, 2 * layer + 1, stream, index)

    def final(self, stream: Flat, index: Index) -> Flat:
        """The same for the final norm."""
        return self._at("final", -1, self.plan.order.end, stream, index)

    def _at(self, kind: str, layer: int, stage: int, stream: Flat, index: Index) -> Flat:
        where, read = self.where(kind, layer, index), self.received(stage, stream, index)
        return read if where is None else torch.where(where, read, stream)

    def received(self, stage: int, stream: Flat, index: Index) -> Flat:
        """What the receivers at a stage read: attention at 2 l, the MLP at 2 l + 1, then the final norm."""
        return stream + self.change[index]


class Held(Live):
    """`fixed receivers, MLPs frozen`: a receiver holds the base run's stream with the sender's new value in it."""

    def received(self, stage: int, stream: Flat, index: Index) -> Flat:
        plan, at = self.plan, (self.cells.pair[index], self.cells.pos[index])
        base = plan.base.streams[stage // 2][at]
        if stage % 2 and plan.order.within:
            base = base + plan.base.attn_out[stage // 2][at]
        return base + self.change[index]


class Recorded(Live):
    """`fixed receivers`: a receiver holds what it read while the other heads were frozen and every MLP recomputed.

    With the heads frozen no position reads another, so that MLPs run on the cells alone.
    """

    def __init__(self, plan: PathPlan, cells: Cells):
        super().__init__(plan, cells)
        self.seen: dict[int, Flat] = {}  # by stage
        self._record()

    def received(self, stage: int, stream: Flat, index: Index) -> Flat:
        return self.seen[stage][index]

    def _record(self) -> None:
        """Walk the layers once with attention frozen; cells join at their sender."""
        plan, cells, x = self.plan, self.cells, torch.empty_like(self.change)
        joins: dict[tuple[str, int], list[Tensor]] = {}
        for sender, at in cells.senders:
            joins.setdefault((sender.kind, sender.layer), []).append(torch.arange(at.start, at.stop, device=x.device))
        active = x.new_zeros(0, dtype=torch.long)
        for layer in range(plan.model.cfg.n_layers):
            if layer == 0 and ("embed", -1) in joins:
                active = torch.cat(joins["embed", -1])
                x[active] = plan.base.streams[0][cells.pair[active], cells.pos[active]] + self.change[active]
            if 2 * layer > plan.stages[-1]:
                return
            if 2 * layer in plan.stages:
                self.seen[2 * layer] = x.clone()
            heads = torch.cat(joins.get(("head", layer), [active[:0]]))
            x[heads] = plan.base.streams[layer][cells.pair[heads], cells.pos[heads]]
            active = torch.cat((active, heads))
            if len(active):
                x[active] = self._block(layer, x[active], active, len(heads))
            mlps = torch.cat(joins.get(("mlp", layer), [active[:0]]))
            x[mlps] = plan.base.streams[layer + 1][cells.pair[mlps], cells.pos[mlps]] + self.change[mlps]
            active = torch.cat((active, mlps))
        self.seen[plan.order.end] = x

    def _block(self, layer: int, x: Flat, active: Index, n_new: int) -> Flat:
        """The rest of a block after frozen attention; the last `n_new` cells are those of its own heads."""
        plan, cells = self.plan, self.cells
        attn_out = plan.base.attn_out[layer][cells.pair[active], cells.pos[active]]
        attn_out[len(active) - n_new :] += self.change[active[len(active) - n_new :]]
        hooks: list[tuple[Any, HookFn]] = []
        if 2 * layer + 1 in plan.stages:

            def record(act: Tensor, hook: Any) -> None:
                self.seen[2 * layer + 1] = torch.empty_like(self.change).index_copy_(0, active, act[0])

            hooks = [(("mlp_in", layer), record)]
        with plan.model.hooks(hooks):
            return plan.model.blocks[layer].finish(x[None], attn_out[None])[0]


_READINGS: dict[str, type[Live]] = {EDGES: Live, FIXED: Recorded, FIXED_FROZEN: Held}


def reading(plan: PathPlan, items: Sequence[Item], where: Sequence[Int[Tensor, "_"]]) -> Live:
    """What the receivers of items read at these positions, in the plan's semantics."""
    return _READINGS[plan.semantics](plan, cells_of(plan, items, where))


def walk_paths(plan: PathPlan, reader: Reader, items: Sequence[Item]) -> list[Tensor]:
    """The stream that leaves the last block, at the positions that are read, for every item."""
    out: dict[int, Tensor] = {}
    late = [is_late(plan, reader, item) for item in items]
    for which in (True, False):
        numbers = [i for i, at_end in enumerate(late) if at_end is which]
        if numbers:
            chosen = [items[i] for i in numbers]
            streams = _late(plan, reader, chosen) if which else _Walk(plan, reader, chosen).run()
            out |= dict(zip(numbers, streams, strict=True))
    return [out[i] for i in range(len(items))]


def stage_of(plan: PathPlan, item: Item) -> int:
    stage = plan.enters(plan.senders[item.patch])
    assert stage is not None  # a sender that reaches nothing is no item
    return stage


def is_late(plan: PathPlan, reader: Reader, item: Item) -> bool:
    """Is the item first read by the final norm, or by queries or the MLP of the last layer? Then no position that the
    metric does not read matters."""
    stage = stage_of(plan, item)
    if stage == plan.order.end:
        return True
    last = plan.model.cfg.n_layers - 1
    return plan.causal and reader.read is not None and stage // 2 == last and not plan.moves_keys(last)


def _late(plan: PathPlan, reader: Reader, items: Sequence[Item]) -> list[Tensor]:
    """Late items: computed only at the positions that are read."""
    last, end = plan.model.cfg.n_layers - 1, plan.order.end
    every = torch.arange(plan.tokens.shape[1], device=plan.tokens.device)
    where = [every[item.start :] if reader.read is None else reader.read[item.pair] for item in items]
    reads = reading(plan, items, where)
    cells = reads.cells
    final = plan.base.streams[last + 1][cells.pair, cells.pos]
    lengths = torch.tensor([len(positions) for positions in where], device=final.device)
    stages = torch.tensor([stage_of(plan, item) for item in items], device=final.device).repeat_interleave(lengths)
    for stage in {*stages.tolist()} - {end}:
        index = (stages == stage).nonzero().flatten()
        final[index] = _joining_after(plan, reads, last, index, queries=stage == 2 * last)
    if plan.stages[-1] == end:
        final = reads.final(final, torch.arange(len(final), device=final.device))
    return list(final.split(lengths.tolist()))


class _Walk:
    """Items whose rows pass whole blocks, from where some head or MLP first reads the sender."""

    def __init__(self, plan: PathPlan, reader: Reader, items: Sequence[Item]):
        self.plan, self.reader, self.items = plan, reader, items
        every = torch.arange(plan.tokens.shape[1], device=plan.tokens.device)
        self.reads = reading(plan, items, [every[item.start :] for item in items])
        self.cells = self.reads.cells
        self.joining: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # stage, start: items
        for number, item in enumerate(items):
            self.joining[stage_of(plan, item)][item.start].append(number)

    def run(self) -> list[Tensor]:
        plan, last = self.plan, self.plan.model.cfg.n_layers - 1
        groups: list[Group] = []
        for layer in range(min(self.joining) // 2, last + 1):
            read = self.reader.read if layer == last and plan.causal else None
            fresh = self._joined(layer, 2 * layer)
            if plan.moves_keys(layer):
                groups, fresh = merge(groups + fresh), []
            groups = self._block(layer, groups, read) if groups else []
            for queries, joined in ((True, fresh), (False, self._joined(layer, 2 * layer + 1))):
                for group in joined:
                    index = self.cells.of(group, _places(group, read))
                    left = _joining_after(plan, self.reads, layer, index, queries=queries)
                    groups += unpack(left[None], [group], None if read is None else read.shape[1])
            groups = merge(groups) if layer < last else groups
        streams = self.reader.finals(groups, read is not None)
        if plan.stages[-1] == plan.order.end:
            self._patch_final(groups, streams)
        return [streams[i] for i in range(len(self.items))]

    def _joined(self, layer: int, stage: int) -> list[Group]:
        """The base run's rows of items that first differ at this stage, as they enter the layer."""
        device = self.plan.tokens.device
        groups = []
        for start, numbers in self.joining.get(stage, {}).items():
            pair = torch.tensor([self.items[i].pair for i in numbers], device=device)
            x = self.plan.base.streams[layer][pair, start:]
            groups.append(Group(start, pair, torch.tensor(numbers, device=device), x))
        return groups

    def _block(self, layer: int, groups: list[Group], read: Tensor | None) -> list[Group]:
        """Through a block, with what its receivers read written in."""
        plan = self.plan
        ctx, flat = PackedContext(plan.base.past, plan.tokens.shape[1], groups, read), pack(groups)
        index = torch.cat([self.cells.of(group) for group in groups])
        edits = self._qkv(layer, flat, index, ctx) + _mlp_edit(plan, self.reads, layer, ctx.select(index[None])[0])
        with plan.model.hooks(edits):
            return through(plan.model.blocks[layer], flat, groups, ctx)

    def _qkv(self, layer: int, flat: Float[Tensor, "one cell d_model"], index: Index, ctx: Context) -> Edits:
        """Hooks that write the q, k, v of this layer's receivers, each read through the block's own norm."""
        plan, block = self.plan, self.plan.model.blocks[layer]
        if 2 * layer not in plan.stages:
            return []
        read = self.reads.received(2 * layer, flat[0], index)[None]
        asking = ctx.select(index[None])[0]
        edits: Edits = []
        for kind in ("q", "k", "v"):
            heads = plan.heads_at(kind, layer)
            if heads:
                normed = block.quiet_norm(ctx.select(read) if kind == "q" else read)
                value = receiver_heads(getattr(block.attn, kind), normed, heads, block.attn.d_head)
                where = self.reads.where(kind, layer, asking if kind == "q" else index)
                edits.append(((kind, layer), writing(value, None if where is None else where[None], heads)))
        return edits

    def _patch_final(self, groups: list[Group], streams: dict[int, Tensor]) -> None:
        """Put the sender's new value into what is unembedded, where the final stream is a receiver."""
        for group in groups:
            items, index = group.item.tolist(), self.cells.of(group, _places(group, self.reader.read))
            finals = torch.stack([streams[item] for item in items])
            finals = self.reads.final(finals.flatten(0, 1), index).view_as(finals)
            streams |= dict(zip(items, finals, strict=True))


def _places(group: Group, read: Int[Tensor, "pair read"] | None) -> Int[Tensor, "row read"] | None:
    """The read positions of a group's rows, counted from its start; one before it is clamped, and ignored later."""
    return None if read is None else (read[group.pair] - group.start).clamp_min(0)


def _mlp_edit(plan: PathPlan, reads: Live, layer: int, index: Index) -> Edits:
    if 2 * layer + 1 not in plan.stages:
        return []
    return [(("mlp_in", layer), lambda act, hook: reads.mlp(layer, act[0], index)[None])]


def _joining_after(plan: PathPlan, reads: Live, layer: int, index: Index, *, queries: bool) -> Flat:
    """What leaves a block for cells whose keys and values are the base run's: only queries, or only the MLP, differ."""
    pair, pos = reads.cells.pair[index], reads.cells.pos[index]
    x, attn_out = plan.base.streams[layer][pair, pos], plan.base.attn_out[layer][pair, pos]
    if queries:
        attn_out = _asked_anew(plan, reads, layer, index)
    with plan.model.hooks(_mlp_edit(plan, reads, layer, index)):
        return plan.model.blocks[layer].finish(x[None], attn_out[None])[0]


def _asked_anew(plan: PathPlan, reads: Live, layer: int, index: Index) -> Flat:
    """attn_out where the receivers' queries differ: only their heads' mixtures of the base run's values change."""
    block, attn, heads = plan.model.blocks[layer], plan.model.blocks[layer].attn, plan.heads_at("q", layer)
    pair, pos = reads.cells.pair[index], reads.cells.pos[index]
    read = reads.received(2 * layer, plan.base.streams[layer][pair, pos], index)
    q = read.new_zeros(1, len(read), attn.n_heads, attn.d_head)
    q[:, :, heads] = receiver_heads(attn.q, block.quiet_norm(read[None]), heads, attn.d_head)
    # rotary frequencies can depend on how long the whole row is, which these positions alone do not say
    ctx = Context(pos, lengths=torch.tensor(plan.tokens.shape[1], device=pos.device))
    q, _ = attn.place(q, q[:, :, : attn.n_kv_heads], ctx)
    keys, values = plan.base.past.of_layer(layer)
    z, every = torch.empty_like(q), torch.arange(plan.tokens.shape[1], device=pos.device)
    for number in pair.unique().tolist():
        here = pair == number
        view = View(attn.mask.allows(pos[here, None], every)[None, None])
        z[:, here] = attn.mix(q[:, here], keys[number : number + 1], values[number : number + 1], view)
    old = plan.base.z[layer][pair, pos]
    new = old.clone()
    where = reads.where("q", layer, index)
    new[:, heads] = z[0][:, heads] if where is None else torch.where(where[..., None], z[0][:, heads], old[:, heads])
    return plan.base.attn_out[layer][pair, pos] + heads_write(
        plan, layer, pair=pair, pos=pos, old=old, new=new, heads=heads
    )
