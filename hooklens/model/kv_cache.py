"""The state that blocks share in a forward pass: token positions, masks, and earlier keys and values."""

import copy
import operator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.model.config import Causal, MaskPart, NoMask, Rotary
from hooklens.model.embed import rotary_tables

Keys = Float[Tensor, "batch key_pos kv_head d_head"]
NewKeys = Float[Tensor, "batch new_pos kv_head d_head"]
Store = Float[Tensor, "batch room kv_head d_head"]
Kept = Float[Tensor, "kept_batch room kv_head d_head"]
Queries = Float[Tensor, "batch query_pos head d_head"]
Angles = Float[Tensor, "*batch table_pos turned"]
# The memory of a cache whose layers are one tensor, and each layer's share of it.
Joined = tuple[Float[Tensor, "layer _batch _room key_value kv_head d_head"], list[tuple[Tensor, Tensor]]]
QueryAngles = Float[Tensor, "*query_batch query_pos turned"]


class KVCache:
    """The keys and values of the tokens so far, as attention uses them (keys after rotary).

    >>> from hooklens.testing import tiny_model
    >>> model, past = tiny_model(), KVCache()
    >>> whole = model([[1, 2, 3]])
    >>> _ = model([[1, 2]], kv_cache=past)
    >>> torch.allclose(model([[3]], kv_cache=past)[:, -1], whole[:, -1], atol=1e-5), past.length, past.step
    (True, 3, 2)
    """

    def __init__(self) -> None:
        self.length = self.step = 0
        #: The number of tokens that a generation adds to the prompt at most; None if it is not known.
        self.to_come: int | None = None
        self.seen: Bool[Tensor, "batch key"] | None = None
        #: If rotary frequencies depend on a row's length: the lengths for which the keys are rotated, and each pass's
        #: input and first layer, from which they are rebuilt when a row outgrows its frequencies.
        self.lengths: Int[Tensor, "*row"] | None = None
        self.passes: list[tuple[Shaped[Tensor, "batch new_pos *rest"], int | None]] = []
        self._layers: dict[int, tuple[Keys, Keys]] = {}

    def extend(self, layer: int, k: NewKeys, v: NewKeys) -> tuple[Keys, Keys]:
        """Append a layer's new keys and values; return all, including earlier ones."""
        stores = self._layers.get(layer)
        self._check(layer, k, stores)
        end = self.length + k.shape[1]
        if torch.is_grad_enabled():
            if self.length:
                before = self.of_layer(layer)
                k, v = torch.cat((before[0], k), 1), torch.cat((before[1], v), 1)
            self._layers[layer] = (k, v)
            return k, v
        if stores is None or stores[0].shape[1] < end:
            old_k, old_v = stores or (None, None)
            stores = self._layers[layer] = (self._grown(old_k, k, end), self._grown(old_v, v, end))
        for store, new in zip(stores, (k, v), strict=True):
            store.narrow(1, self.length, k.shape[1]).copy_(new)  # half the calls of an index, which a short step counts
        return stores[0].narrow(1, 0, end), stores[1].narrow(1, 0, end)

    def joined(self, n_layers: int, new: NewKeys, known: Joined | None = None) -> Joined:
        """One memory of all layers with room for new keys of this shape, for callers that write them there themselves.

        It is `known`, which an earlier call returned, if that has the room and no layer was moved since.
        """
        stores, end = [self._layers.get(layer) for layer in range(n_layers)], self.length + new.shape[1]
        self._check(0, new, stores[0])
        if self.length and known is not None and all(map(operator.is_, stores, known[1])) and known[0].shape[2] >= end:
            return known
        for layer in range(1, n_layers):
            self._check(layer, new, stores[layer])
        room = end if stores[0] is None else stores[0][0].shape[1]
        size = (n_layers, len(new), room if room >= end else max(end, 2 * room), 2, *new.shape[2:])
        with torch.inference_mode(False), torch.no_grad():  # what the inference mode makes, only it can write to
            store = new.new_empty(size)
            for layer in range(n_layers if self.length else 0):
                store[layer, :, : self.length] = torch.stack(self.of_layer(layer), 2)
            shares = [(share[:, :, 0], share[:, :, 1]) for share in store.unbind()]
        self._layers.update(enumerate(shares))
        return store, shares

    def _check(self, layer: int, k: NewKeys, stores: tuple[Kept, Kept] | None) -> None:
        if self.length and stores is None:
            raise InputError(
                f"this KV cache has {self.length} tokens but no layer {layer}: an earlier pass stopped below it or "
                "started above it; use a KV cache with one range of layers only"
            )
        if self.length and stores is not None and stores[0].shape[0] != k.shape[0]:
            raise InputError(f"this KV cache has {stores[0].shape[0]} rows, got {k.shape[0]}; keep_rows() selects rows")

    def _grown(self, old: Store | None, new: NewKeys, end: int) -> Float[Tensor, "batch more_room kv_head d_head"]:
        room = end if old is None else max(end, 2 * old.shape[1])  # doubling: each key is copied at most twice
        store = new.new_empty((new.shape[0], room, *new.shape[2:]))
        if old is not None:
            store[:, : self.length] = old[:, : self.length]
        return store

    def of_layer(self, layer: int) -> tuple[Keys, Keys]:
        """The keys and values of one layer."""
        if layer not in self._layers:
            raise InputError(f"this KV cache has no layer {layer}; it has {self.length} tokens")
        k, v = self._layers[layer]
        return k[:, : self.length], v[:, : self.length]

    @property
    def top(self) -> int:
        """The layer below which the cache contains keys and values."""
        return max(self._layers, default=-1) + 1

    def advance(self, x: Shaped[Tensor, "batch new_pos *rest"], ctx: "Context", start_at: int | None = None) -> None:
        """Record a complete forward pass over `x` (tokens, or the stream that enters layer `start_at`)."""
        self.length, self.step, self.seen = self.length + x.shape[1], self.step + 1, ctx.key_seen
        if ctx.lengths is not None:
            self.lengths = ctx.lengths
            self.passes.append((x, start_at))

    def keep_rows(self, rows: Int[Tensor, "kept"]) -> None:
        """Keep some rows of the batch, in the given order: to drop finished prompts or reorder beams."""
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}
        self.seen = None if self.seen is None else self.seen[rows]
        self.lengths = self.lengths[rows] if self.lengths is not None and self.lengths.ndim else self.lengths
        self.passes = [(x[rows], start_at) for x, start_at in self.passes]

    def before(self, pos: int) -> "KVCache":
        """A cache of the tokens before a position, with the rotary lengths of the whole rows."""
        kept = copy.copy(self)
        kept.length, kept.seen = pos, None if self.seen is None else self.seen[:, :pos]
        kept._layers = {layer: (k[:, :pos], v[:, :pos]) for layer, (k, v) in self._layers.items()}
        kept.passes = []
        return kept


class View(NamedTuple):
    """The keys that queries may attend to; `seen` None: all, or a lower triangle if `causal`. `blank`: some see 0."""

    seen: Bool[Tensor, "batch 1 query_pos key_pos"] | None
    causal: bool = False
    blank: bool = False


@dataclass
class Context:
    """Positions, masks and cache of one forward pass. The sweep engine passes its own kind."""

    positions: Int[Tensor, "*batch pos"]
    offset: int = 0
    key_seen: Bool[Tensor, "batch key"] | None = None
    cache: KVCache | None = None
    chosen: Int[Tensor, "batch"] | None = None
    lengths: Int[Tensor, "*row"] | None = None  # tokens of each row; None: up to the last position
    _tables: dict = field(default_factory=dict)
    _views: dict = field(default_factory=dict)

    def narrowed(self, chosen: Int[Tensor, "batch"]) -> "Context":
        """The same pass, restricted to one selected query position per row."""
        return replace(self, chosen=chosen, _views={})

    def select(self, x: Shaped[Tensor, "batch pos *rest"]) -> Shaped[Tensor, "batch query_pos *rest"]:
        """The rows of `x` (batch pos ...) at the query positions: all, or the selected one of each row."""
        if self.chosen is None:
            return x
        return x[torch.arange(x.shape[0], device=x.device), self.chosen][:, None]

    def tables(self, part: Rotary, d_head: int, dtype: torch.dtype) -> tuple[Angles, Angles]:
        """Cosines and sines at the positions of this pass, computed once for all layers."""
        key = (part, d_head, dtype)
        if key not in self._tables:
            cos, sin = rotary_tables(part, d_head, self.positions, dtype, self.lengths)
            self._tables[key] = (cos, sin) if cos.ndim == 3 else (cos[None], sin[None])
        return self._tables[key]

    def query_tables(self, cos: Angles, sin: Angles, batch: int) -> tuple[QueryAngles, QueryAngles]:
        """The rows of the tables at the query positions."""
        if self.chosen is None:
            return cos, sin
        return self.select(cos.expand(batch, -1, -1)), self.select(sin.expand(batch, -1, -1))

    def view(self, mask: MaskPart) -> View:
        """The keys that this pass's queries may attend to under a mask; computed once for all layers that share it."""
        if mask not in self._views:
            self._views[mask] = self._make_view(mask)
        return self._views[mask]

    def _make_view(self, mask: MaskPart) -> View:
        n_new = self.positions.shape[-1]
        if self.key_seen is None:
            if type(mask) is NoMask:
                return View(None)
            if self.chosen is None and type(mask) is Causal and (n_new == 1 or self.offset == 0):
                return View(None, causal=n_new > 1)
            keys = torch.arange(self.offset + n_new, device=self.positions.device)[None]
        else:  # padding is not counted, or a window would cover fewer tokens; before the first token it is -1
            keys = self.key_seen.long().cumsum(1) - 1
        queries = keys[:, self.offset :]
        if self.chosen is not None:
            queries = queries.expand(len(self.chosen), -1).gather(1, self.chosen[:, None])
        seen = mask.allows(queries[:, None, :, None], keys[:, None, None, :])
        if self.key_seen is not None:
            seen = seen & self.key_seen[:, None, None, :]
        return View(seen, blank=self.key_seen is not None)

    def attend(self, attn, q: Queries, k: NewKeys, v: NewKeys) -> Queries:
        """Each query's weighted sum of values, including cached ones."""
        if self.cache is not None:
            k, v = self.cache.extend(attn.layer, k, v)
        return attn.mix(q, attn.see_keys(k), v, self.view(attn.mask))
