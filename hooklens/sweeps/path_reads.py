"""What receivers read: the live stream with the sender's new value in it, or a stream that was recorded before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.hooks import HookFn
from hooklens.sweeps.paths import EDGES, FIXED, FIXED_FROZEN, PathPlan, sent
from hooklens.sweeps.protocol import Item
from hooklens.sweeps.rows import Group

Flat = Float[Tensor, "cell d_model"]
Index = Int[Tensor, "cell"]


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


def reading(plan: PathPlan, cells: Cells) -> Live:
    """What the receivers of these cells read, in the plan's semantics."""
    return _READINGS[plan.semantics](plan, cells)
