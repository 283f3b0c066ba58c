"""How an overwritten site enters its block: the stream that leaves the block, recomputed only where it can change."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.model.kv_cache import Context
from hooklens.sweeps.planning import SITES, Patch, Plan
from hooklens.sweeps.rows import Group

if TYPE_CHECKING:
    from hooklens.model.block import Block


def entering(plan: Plan, layer: int, start: int, items: list[tuple[int, Patch, int]]) -> Group:
    """The rows, as they leave block `layer`, of patches there that begin at `start`; items are (number, patch, pair).

    For resid_pre: as they enter it.
    """
    device = plan.tokens.device
    pair = torch.tensor([b for _, _, b in items], device=device)
    item = torch.tensor([number for number, _, _ in items], device=device)
    patches = [patch for _, patch, _ in items]
    end = _last_written(plan, patches[0], start)
    written = _write(plan, layer, patches=patches, pair=pair, start=start, end=end)
    if plan.site == "resid_pre":
        x = plan.base.streams[layer][pair, start:]
        x[:, : end - start] = written
        return Group(start, pair, item, x)
    x = plan.base.streams[layer + 1][pair, start:]
    x[:, : end - start] = _leaving(plan, layer, pair=pair, start=start, end=end, written=written)
    return Group(start, pair, item, x)


def _last_written(plan: Plan, patch: Patch, start: int) -> int:
    """Where this layer's output stops changing: keys and values reach every later query, the rest its own position."""
    local = plan.causal and patch.pos is not None and plan.site not in ("k", "v")
    return start + 1 if local else plan.tokens.shape[1]


def _write(plan: Plan, layer: int, patches: list[Patch], pair: Tensor, start: int, end: int) -> Tensor:
    """The site's activation at positions `start` to `end` with every patch written (all positions for q, k, v)."""
    span = slice(0, None) if plan.site in ("q", "k", "v") else slice(start, end)
    old, new = plan.base.acts[layer], plan.values[layer]
    if plan.site == "pattern":
        out, value = old[pair, :, span], new[pair, :, span]
        rows = _rows(patches, start, end)
        for row, patch in enumerate(patches):
            head = slice(None) if patch.head is None else patch.head
            out[row, head, rows] = value[row, head, rows]
        return out
    out, value = old[pair, span], new[pair, span]
    at = patches[0].pos
    where = slice(None) if at is None else slice(at - (span.start or 0), at - (span.start or 0) + 1)
    heads = _column([patch.head for patch in patches], pair)
    neurons = _column([patch.neuron for patch in patches], pair)
    if heads is None and neurons is None:
        out[:, where] = value[:, where]
    else:
        column = heads if heads is not None else neurons
        every = torch.arange(len(pair), device=pair.device)
        out[every, where, column] = value[every, where, column]
    return out


def _rows(patches: list[Patch], start: int, end: int) -> slice:
    return slice(None) if patches[0].pos is None else slice(patches[0].pos - start, patches[0].pos - start + 1)


def _column(values: list[int | None], like: Tensor) -> Int[Tensor, "row"] | None:
    return None if values[0] is None else torch.tensor(values, device=like.device)


def _leaving(plan: Plan, layer: int, pair: Tensor, start: int, end: int, written: Tensor) -> Float[Tensor, "row pos d"]:
    """What leaves the block at positions `start` to `end`, from the written activation."""
    block: Block = plan.model.blocks[layer]
    mlp: Any = block.mlp
    base, entry = plan.base, SITES[plan.site].entry
    if entry == "stream":  # resid_post
        return block.leave(written)
    if entry == "mid":
        return block.finish_mid(written)
    x = base.streams[layer][pair, start:end]
    if entry == "attn":
        return block.finish(x, _attn_out(plan, block, layer=layer, pair=pair, start=start, end=end, written=written))
    stream = block.mlp_base(x, base.attn_out[layer][pair, start:end])
    added = written if plan.site == "mlp_out" else block.mlp_adds(mlp.out(written))
    return block.leave(stream + added)


def _attn_out(plan: Plan, block: "Block", layer: int, pair: Tensor, start: int, end: int, written: Tensor) -> Tensor:
    if plan.site == "attn_out":
        return written
    attn = block.attn
    if plan.site == "result":
        z = plan.base.z[layer][pair, start:end]
        raw = attn.output(z) + (written - plan.base.acts[layer][pair, start:end]).sum(2)
        return block.attn_adds(raw)
    if plan.site == "pattern":
        _, v = plan.base.past.of_layer(layer)
        z = attn.weigh(written, v[pair])
    elif plan.site == "z":
        z = written
    else:
        z = _z_from_qkv(plan, attn, layer, pair, written)[:, start:end]
    return block.attn_adds(attn.output(z))


def _z_from_qkv(plan: Plan, attn, layer: int, pair: Tensor, written: Tensor) -> Tensor:
    q, k, v = (act[pair] for act in plan.base.qkv[layer])
    q, k, v = (written if plan.site == name else act for name, act in (("q", q), ("k", k), ("v", v)))
    ctx = Context(torch.arange(plan.tokens.shape[1], device=pair.device))
    q, k = attn.place(q, k, ctx)
    return attn.mix(q, attn.see_keys(k), v, ctx.view(attn.mask))
