"""Values to write that come from other prompts: means over a reference or the other prompts, runs of another length."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.names import axes
from hooklens.core.precision import widened
from hooklens.data.prompts import Pairs, common_ends, rows_of
from hooklens.sweeps.plan import base_run
from hooklens.sweeps.sites import SITES


@dataclass(frozen=True)
class Mean:
    """A value to write: the mean activation over reference prompts, by position where they are of that length."""

    reference: Any


def mean_of(model, value: Mean, into: Tensor, site: str) -> dict[str, Tensor]:
    """Position by position where the reference prompts have the patched prompts' length, else over all positions."""
    rows = rows_of(model, value.reference, "reference")
    by_pos = all(len(row) == into.shape[1] for row in rows)
    n = len(rows) if by_pos else sum(map(len, rows))
    return {name: total / n for name, total in _sums(model, rows, site, by_pos).items()}


def means_of_others(model, prompts: list[Tensor], groups: list[Pairs], site: str) -> list[dict[str, Tensor]]:
    """For each prompt the mean over all the others, as `mean_of` has it: no prompt is in its own."""
    by_pos, lengths = len(groups) == 1, torch.tensor([len(row) for row in prompts])
    own = [_sums(model, [row], site, by_pos) for row in prompts]
    weight = torch.ones_like(lengths) if by_pos else lengths
    found = {}
    for name, one in own[0].items():
        every = widened(torch.cat([each[name] for each in own]))
        left = (weight.sum() - weight).to(every).view(-1, *[1] * (every.ndim - 1))
        found[name] = ((every.sum(0) - every) / left).to(one.dtype)
    return [{name: value[list(group.index)] for name, value in found.items()} for group in groups]


def _sums(model, rows: list[Tensor], site: str, by_pos: bool) -> dict[str, Tensor]:
    """Of every layer, over prompts that are run one at a time: of many only sums are held."""
    if _of_pairs(site) and not by_pos:
        raise InputError(f"a mean {site} needs reference prompts of the patched prompts' length")
    names = [f"blocks.{layer}.{SITES[site].point}" for layer in range(model.cfg.n_layers)]
    sums: dict[str, Tensor] = {}
    for row in rows:
        _, cache = model.run_with_cache(row[None], names=names, stop_at_layer=model.cfg.n_layers)
        for name in names:
            found = cache[name] if by_pos else cache[name].sum(1, keepdim=True)
            sums[name] = sums[name] + found if name in sums else found
    return sums


def _of_pairs(site: str) -> bool:
    """Has the site a number for every pair of a query and a key?"""
    return {"query_pos", "key_pos"} <= {*axes(f"blocks.0.{SITES[site].point}")}


def aligned(model, into: Tensor, other: Tensor, site: str) -> dict[str, Tensor]:
    """The other run's activations at the positions that both prompts share, the base run's own between."""
    if _of_pairs(site):
        raise InputError(f"{site}s of prompts of different length cannot be matched; patch z, or re-word the prompts")
    layers = range(model.cfg.n_layers)
    mine, theirs = (base_run(model, tokens, site, layers).acts for tokens in (into, other))
    names = {layer: f"blocks.{layer}.{SITES[site].point}" for layer in layers}
    out = {}
    for layer, name in names.items():
        out[name] = mine[layer].clone()
        for pair in range(len(into)):
            first, last = common_ends(into[pair], other[pair])
            out[name][pair, :first] = theirs[layer][pair, :first]
            if last:
                out[name][pair, -last:] = theirs[layer][pair, -last:]
    return out
