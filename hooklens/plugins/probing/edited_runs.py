"""Run prompts again from an edited position on, with many directions at once."""

import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.names import axes, parse
from hooklens.core.progress_bar import progress
from hooklens.data.prompts import Pairs
from hooklens.model.kv_cache import KVCache
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.measure import Reader

_ROWS = 2048  # maximum number of positions per forward pass


def run_edited(
    model: HookedTransformer,
    groups: list[Pairs],
    metric: Any,
    *,
    point: str,
    pos: Int[Tensor, "prompt"],
    shift: Float[Tensor, "edit prompt"],
    directions: Float[Tensor, "direction d"],
) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "edit direction prompt"]]:
    """The metric of every prompt, plain and with its activation moved by its shift along each direction."""
    n = shift.shape[1]
    plain, edited = shift.new_zeros(n), shift.new_zeros(len(shift), len(directions), n)
    with torch.no_grad(), packed_linears(rows=1024), progress("directions", n, unit="prompts") as advance:
        for pairs in groups:
            rows = torch.tensor(pairs.index)
            values = _of_one_length(
                model, pairs, metric, point=point, pos=pos[rows], shift=shift[:, rows], directions=directions
            )
            plain[rows], edited[:, :, rows] = (value.to(shift) for value in values)
            advance(len(rows))
    return plain, edited


def _of_one_length(
    model: HookedTransformer, pairs: Pairs, metric: Any, *, point: str, pos: Tensor, shift: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs start at the edited layer and at the first edited position, with the earlier keys and values cached."""
    layer, n, n_layers = getattr(parse(point), "layer", 0), len(pairs.clean), model.cfg.n_layers
    before = f"blocks.{layer}.hook_resid_pre"
    start = int(pos.min()) if model.cfg.causal and "key_pos" not in axes(point) else 0  # rot_k shows cached keys again
    keys = KVCache()
    last, cache = model.run_with_cache(pairs.clean, names=[before], stop_at_layer=n_layers, kv_cache=keys)
    past, stream = keys.before(start), cache[before][:, start:]
    reader, place = Reader(model, pairs.of(metric), last), pos.to(stream.device) - start
    moves = torch.cartesian_prod(torch.arange(len(shift)), torch.arange(len(directions)))
    values = []
    for part in moves.split(max(1, _ROWS // stream[..., 0].numel())):
        change = shift[part[:, 0], :, None] * directions[part[:, 1], None]  # move prompt d
        rows, rows_past = torch.arange(n, device=stream.device).repeat(len(part)), None
        if start:
            rows_past = copy.copy(past)
            rows_past.keep_rows(rows)
        with model.hooks(fwd_hooks=[(point, partial(_add, change.flatten(0, 1).to(stream), place[rows]))]):
            edited = model(stream[rows], start_at_layer=layer, stop_at_layer=n_layers, kv_cache=rows_past)
        for prompts in edited.unflatten(0, (-1, n)):
            values.append(reader.on_stream(torch.cat([last[:, :start], prompts], 1)))
    return reader.base, torch.stack(values).view(len(shift), len(directions), n)


def _add(change: Float[Tensor, "row d"], pos: Int[Tensor, "row"], act: Tensor, hook: Any) -> Tensor:
    at = (torch.arange(len(act), device=act.device), pos)
    act[at] += change.view(act[at].shape)
    return act
