"""Rows of residual stream from a position to the end, packed into one flat tensor, and how they pass a block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.progress_bar import step
from hooklens.model.block import Block
from hooklens.model.config import Causal, MaskPart
from hooklens.model.embed import rotary_tables
from hooklens.model.kv_cache import Context, KVCache, View

Flat = Float[Tensor, "one row d_model"]


@dataclass(eq=False)
class Group:
    """Rows that begin at one position: `x` is row, position from `start` on, d_model; `item` names each row."""

    start: int
    pair: Int[Tensor, "row"]
    item: Int[Tensor, "row"]
    x: Float[Tensor, "row pos d_model"]

    def join(self, other: "Group") -> "Group":
        """Both groups' rows; they begin at the same position."""
        parts = ((self.pair, other.pair), (self.item, other.item), (self.x, other.x))
        return Group(self.start, *map(torch.cat, parts))


def merge(groups: Sequence[Group]) -> list[Group]:
    """One group a start position."""
    merged: dict[int, Group] = {}
    for group in groups:
        merged[group.start] = merged[group.start].join(group) if group.start in merged else group
    return [merged[start] for start in sorted(merged)]


def pack(groups: Sequence[Group]) -> Flat:
    """All rows of all groups, end to end: the matrix products of a block see one tall matrix."""
    return torch.cat([group.x.flatten(0, 1) for group in groups])[None]


def unpack(flat: Flat, groups: Sequence[Group], width: int | None = None) -> list[Group]:
    """The groups with their rows taken back from the flat tensor; `width` positions a row where it holds only those."""
    widths = [group.x.shape[1] if width is None else width for group in groups]
    parts = flat[0].split([len(group.pair) * n for group, n in zip(groups, widths, strict=True)])
    return [
        Group(group.start, group.pair, group.item, x.view(len(group.pair), n, -1))
        for group, x, n in zip(groups, parts, widths, strict=True)
    ]


class PackedContext(Context):
    """A Context for packed rows: every group attends to the base run's keys before its start, then to its own.

    With `read` (the positions that the metric reads, pair x read) queries are worked for only there.
    """

    def __init__(
        self, past: KVCache, n_pos: int, groups: Sequence[Group], read: Int[Tensor, "pair read"] | None = None
    ):
        device = groups[0].x.device
        super().__init__(torch.cat([torch.arange(g.start, n_pos, device=device).repeat(len(g.pair)) for g in groups]))
        self.past, self.n_pos, self.groups, self.read = past, n_pos, groups, read
        self.index = None if read is None else self._read_index(read)

    def _read_index(self, read: Int[Tensor, "pair read"]) -> Int[Tensor, "query"]:
        """Where in the flat tensor the read positions stand; one before a row's start is clamped, and ignored later."""
        index, offset = [], 0
        for group in self.groups:
            n, length = group.x.shape[:2]
            firsts = offset + length * torch.arange(n, device=read.device)
            index.append((firsts[:, None] + (read[group.pair] - group.start).clamp_min(0)).flatten())
            offset += n * length
        return torch.cat(index)

    def select(self, x: Shaped[Tensor, "one row ..."]) -> Shaped[Tensor, "one query ..."]:
        return x if self.index is None else x[:, self.index]

    def tables(self, part, d_head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (part, d_head, dtype)
        if key not in self._tables:
            every = torch.arange(self.n_pos, device=self.positions.device)
            cos, sin = rotary_tables(part, d_head, every, dtype)
            self._tables[key] = (cos[None, self.positions], sin[None, self.positions])
        return self._tables[key]

    def query_tables(self, cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        return self.select(cos), self.select(sin)

    def attend(self, attn, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z of every group, each over the base run's keys before its start and its own after."""
        base_k, base_v = self.past.of_layer(attn.layer)
        out, row, query = [], 0, 0
        for group in self.groups:
            n, length = group.x.shape[:2]
            n_q = length if self.read is None else self.read.shape[1]
            own_k = k[0, row : row + n * length].view(n, length, *k.shape[2:])
            own_v = v[0, row : row + n * length].view(n, length, *v.shape[2:])
            own_q = q[0, query : query + n * n_q].view(n, n_q, *q.shape[2:])
            keys, values = _after_prefix(base_k, own_k, group), _after_prefix(base_v, own_v, group)
            z = attn.mix(own_q, keys, values, self._view(attn.mask, group))
            out.append(z.reshape(n * n_q, *z.shape[2:]))
            row, query = row + n * length, query + n * n_q
        return torch.cat(out)[None]

    def _view(self, mask: MaskPart, group: Group) -> View:
        keys = torch.arange(self.n_pos, device=group.x.device)
        if self.read is None:
            if group.start == 0 and type(mask) is Causal:
                return View(None, causal=True)
            return View(mask.allows(keys[group.start :, None], keys)[None, None])
        queries = self.read[group.pair].clamp_min(group.start)
        return View(mask.allows(queries[:, None, :, None], keys))


def through(block: Block, flat: Flat, groups: Sequence[Group], ctx: PackedContext) -> list[Group]:
    """The groups, packed as `flat`, as they leave a block: at every position, or those that the context reads."""
    out = block(flat, ctx)
    step(flat.shape[1])
    return unpack(out, groups, None if ctx.read is None else ctx.read.shape[1])


def _after_prefix(base: Tensor, own: Tensor, group: Group) -> Tensor:
    """Base keys or values before the start, then the group's own: filled into one buffer, never copied twice."""
    if group.start == 0:
        return own
    whole = own.new_empty((own.shape[0], group.start + own.shape[1], *own.shape[2:]))
    whole[:, : group.start] = base[group.pair, : group.start]
    whole[:, group.start :] = own
    return whole
