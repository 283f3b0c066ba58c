"""The patches of sites as the engine runs them: only the rows that can change, only the layers above.

A row enters the walk where its patch is; what leaves that block is recomputed only where it can change.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.errors import WrongType
from hooklens.core.hooks import HookFn
from hooklens.model.kv_cache import Context, KVCache
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import first_nonfinite
from hooklens.sweeps.planning import Patch, Plan, component_of
from hooklens.sweeps.protocol import Item, Sweep
from hooklens.sweeps.rows import Group, PackedContext, merge, pack, through
from hooklens.sweeps.sites import OURS, Entry


class SitePatches(Sweep):
    """Overwritten sites: rows enter where their patch is, and pass through every block above."""

    def __init__(self, plan: Plan):
        self.plan, self.model, self.tokens = plan, plan.model, plan.tokens
        self.title = f"patching {plan.site}"

    def __len__(self) -> int:
        return len(self.plan.patches)

    @property
    def stream(self) -> Float[Tensor, "pair pos d_model"]:
        return self.plan.base.streams[-1]

    def name_of(self, number: int) -> str:
        return f"the patch of {self.plan.site} at {component_of(self.model, self.plan.site, self.plan.patches[number])}"

    def layer_of(self, number: int) -> int:
        return self.plan.patches[number].layer

    def live(self, reader: Reader) -> list[Item]:
        plan = self.plan
        n_pos, last = plan.tokens.shape[1], plan.model.cfg.n_layers - 1
        reach = None if reader.read is None else reader.read.amax(1)
        same, items = _Same(plan), []
        for number, patch in enumerate(plan.patches):
            starts = plan.start(patch)
            dead = same(patch) | (starts >= n_pos)
            if plan.causal:
                dead = dead | (plan.first_change >= n_pos)
                if patch.pos is not None:
                    dead = dead | (plan.first_change > patch.pos)
                dead = dead if reach is None else dead | (starts > reach)
                stays = patch.layer == last and patch.pos is not None and plan.local
                if stays and reader.read is not None:
                    dead = dead | reader.read.ne(patch.pos or 0).all(1)
            for pair in (~dead).nonzero().flatten().tolist():
                items.append(Item(number, pair, int(starts[pair])))
        return items

    def walk(self, reader: Reader, items: Sequence[Item]) -> list[Tensor]:
        return _propagate(self.plan, reader, items)

    def plain(self, numbers: Sequence[int], reader: Reader) -> Float[Tensor, "patch pair"]:
        n = len(self.tokens)
        hooks = [self.writing(number, slice(i * n, (i + 1) * n)) for i, number in enumerate(numbers)]
        return reader.under_hooks(self.tokens, hooks, len(numbers))

    def writing(self, number: int, rows: slice = slice(None)) -> tuple[str, HookFn]:
        """The patch as a hook, in those rows of the batch."""
        patch = self.plan.patches[number]
        region, value = self.plan.region(patch), self.plan.values[patch.layer]

        def write(act: Tensor, hook: Any) -> Tensor:
            act[(rows, *region)] = value[(slice(None), *region)]
            return act

        return self.plan.swept.at(patch.layer), write

    def outside(self) -> list[str]:
        site = self.plan.site
        return super().outside() + ([] if site in OURS else [f"the site {site!r} (its `enter`)"])

    def asked(self) -> tuple[Any, Mapping[str, Any]]:
        plan = self.plan
        source = dict(plan.source) if isinstance(plan.source, Mapping) else plan.source
        return (plan.site, plan.by, plan.shape, plan.patches, plan.tokens), {"the value to write": source}

    def sketch(self) -> Sequence[Float[Tensor, "..."]]:
        return [value for _, value in sorted(self.plan.values.items())]

    def fault(self, said: str, values: Float[Tensor, "patch pair"]) -> str:
        plan, more = self.plan, "; hooklens check shows more"
        if (point := first_nonfinite(plan.model, plan.tokens)) is not None:
            return f"the metric is {said}: the model's own activations are not finite from {point} on{more}"
        for layer, value in plan.values.items():
            if not bool(value.isfinite().all()):
                return f"the metric is {said}: the values to write at {plan.swept.at(layer)} are not finite"
        bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
        where = f"the metric is {said} for {len(bad)} of {len(values)} patches"
        point = first_nonfinite(plan.model, plan.tokens, self.writing(bad[0])) if bad else None
        if point is None:
            return (
                f"{where}, though every activation is finite: look at the metric, and whether the model forbids a "
                "token that it reads (a logit of -inf)"
            )
        first = plan.patches[bad[0]]
        return f"{where}, the first of them {first}: with it written, activations are not finite from {point} on"


class _Same:
    """For which pairs a patch writes what is there already; compared once a layer, looked up a patch."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.tables: dict[tuple, Tensor] = {}

    def __call__(self, patch: Patch) -> Tensor:
        region = self.plan.region(patch)
        kept = tuple(axis for axis, index in enumerate(region) if not isinstance(index, slice))
        key = (patch.layer, kept)
        if key not in self.tables:
            equal = self.plan.base.acts[patch.layer] == self.plan.values[patch.layer]
            others = [axis + 1 for axis in range(len(region)) if axis not in kept]
            for axis in reversed(others):
                equal = equal.all(axis)
            self.tables[key] = equal
        return self.tables[key][(slice(None), *(region[axis] for axis in kept))]


def _propagate(plan: Plan, reader: Reader, items: Sequence[Item]) -> list[Tensor]:
    """Walk the layers once: rows enter where their patch is, and pass through every block above."""
    joining = _joining(plan, items)
    last, n_pos = plan.model.cfg.n_layers - 1, plan.tokens.shape[1]
    before = plan.swept.before_block  # enters before its block, every other site after it
    groups: list[Group] = []
    out: dict[int, Tensor] = {}
    for layer in range(min(layer for layer, _ in joining), last + 1):
        new = [entering(plan, layer, start, patches) for (at, (start, *_)), patches in joining.items() if at == layer]
        if before:
            groups = merge(groups + new)
        if groups:
            read = reader.read if layer == last and plan.causal else None
            ctx = PackedContext(plan.base.past, n_pos, groups, read)
            groups = through(plan.model.blocks[layer], pack(groups), groups, ctx)
            if layer == last:
                out |= reader.finals(groups, read is not None)
                groups = []
        if not before:
            groups = merge(groups + new)
    out |= reader.finals(groups, False)
    return [out[i] for i in range(len(items))]


def _joining(plan: Plan, items: Sequence[Item]) -> dict[tuple, list[tuple[int, Patch, int]]]:
    """Items that enter together: one layer, one start, regions of one kind."""
    joining: dict[tuple, list[tuple[int, Patch, int]]] = defaultdict(list)
    for number, item in enumerate(items):
        patch = plan.patches[item.patch]
        kind = (item.start, patch.pos, patch.head is None, patch.neuron is None)
        joining[patch.layer, kind].append((number, patch, item.pair))
    return joining


def entering(plan: Plan, layer: int, start: int, items: list[tuple[int, Patch, int]]) -> Group:
    """The rows, as they leave block `layer`, of patches there that begin at `start`; items are (number, patch, pair).

    For resid_pre: as they enter it.
    """
    device, site, block = plan.tokens.device, plan.swept, plan.model.blocks[layer]
    pair = torch.tensor([b for _, _, b in items], device=device)
    item = torch.tensor([number for number, _, _ in items], device=device)
    patches, n_pos = [patch for _, patch, _ in items], plan.tokens.shape[1]
    if site.before_block:
        return Group(start, pair, item, _written(plan, layer, patches=patches, pair=pair, span=slice(start, n_pos)))
    if site.enter is None or not block.in_steps:
        return Group(start, pair, item, _run_whole(plan, layer, patches=patches, pair=pair, start=start))
    end = start + 1 if plan.local and patches[0].pos is not None else n_pos
    span = slice(0, n_pos) if site.whole else slice(start, end)
    written = _written(plan, layer, patches=patches, pair=pair, span=span)
    entry = Entry(site=site, block=block, layer=layer, base=plan.base, pair=pair, start=start, end=end, written=written)
    x = plan.base.streams[layer + 1][pair, start:]
    left, width = site.enter(entry), end - start
    if not isinstance(left, Tensor) or left.shape != x[:, :width].shape:
        seen = list(left.shape) if isinstance(left, Tensor) else left
        raise WrongType(
            f"`enter` of the site {site.name!r} returns the stream that leaves the block, [row pos d_model] = "
            f"{list(x[:, :width].shape)}; got {seen!r:.60}"
        )
    x[:, :width] = left
    return Group(start, pair, item, x)


def _written(
    plan: Plan, layer: int, patches: list[Patch], pair: Int[Tensor, "row"], span: slice
) -> Shaped[Tensor, "row ..."]:
    """The site's activation at the positions of `span`, with every row's patch written."""
    axis, names = plan.axes.index(plan.pos_name), plan.axes[1:]
    column = next((names.index(name) for name in ("head", "kv_head", "d_mlp") if name in names), axis - 1) + 1
    order = (axis, column) if column != axis else (axis,)
    to = tuple(range(1, 1 + len(order)))  # row, position, head or neuron, the rest
    out, value = (act.movedim(order, to)[pair, span] for act in (plan.base.acts[layer], plan.values[layer]))
    at, first = patches[0].pos, span.start
    where = slice(None) if at is None else slice(at - first, at - first + 1)
    chosen = [patch.neuron if patch.head is None else patch.head for patch in patches]
    if chosen[0] is None:
        out[:, where] = value[:, where]
    else:
        every, which = torch.arange(len(pair), device=pair.device), torch.tensor(chosen, device=pair.device)
        out[every, where, which] = value[every, where, which]
    return out.movedim(to, order)


def _run_whole(
    plan: Plan, layer: int, patches: list[Patch], pair: Int[Tensor, "row"], start: int
) -> Float[Tensor, "row pos d_model"]:
    """What leaves a block that is run from its beginning, with the written activation at its point."""
    keys_only = plan.pos_name == "key_pos"  # the point sees the keys before `start` too
    span = slice(0 if keys_only else start, plan.tokens.shape[1])
    written = _written(plan, layer, patches=patches, pair=pair, span=span)
    ctx = _AfterBase(plan.base.past, pair, start, plan.tokens.shape[1])
    with plan.model.hooks([(plan.swept.at(layer), lambda act, hook: written)]):
        return plan.model.blocks[layer](plan.base.streams[layer][pair, start:], ctx)


class _AfterBase(Context):
    """Rows from `start` on; before it each has the keys and values of its pair in the base run."""

    def __init__(self, past: KVCache, pair: Int[Tensor, "row"], start: int, n_pos: int):
        super().__init__(torch.arange(start, n_pos, device=pair.device), start)
        self.past, self.pair = past, pair

    def attend(self, attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.offset:
            before_k, before_v = (x[self.pair, : self.offset] for x in self.past.of_layer(attn.layer))
            k, v = torch.cat((before_k, k), 1), torch.cat((before_v, v), 1)
        return attn.mix(q, attn.see_keys(k), v, self.view(attn.mask))
