"""How an overwritten site enters its block: the stream that leaves the block, recomputed only where it can change."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.model.kv_cache import Context, KVCache
from hooklens.sweeps.planning import Patch, Plan
from hooklens.sweeps.rows import Group
from hooklens.sweeps.sites import Entry


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
    x[:, : end - start] = site.enter(entry)
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
    with plan.model.hooks([(plan.point(layer), lambda act, hook: written)]):
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
