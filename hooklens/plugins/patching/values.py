"""Values to write that come from other prompts: means over a reference set, and runs of another length."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.prompts import common_ends, rows_of
from hooklens.sweeps.plan import SITES, base_run


@dataclass(frozen=True)
class Mean:
    """A value to write: the mean activation over reference prompts, by position where they are of that length."""

    reference: Any


def mean_of(model, value: Mean, into: Tensor, site: str) -> dict[str, Tensor]:
    """Position by position where the reference prompts have the patched prompts' length, else over all positions."""
    names = [f"blocks.{layer}.{SITES[site].point}" for layer in range(model.cfg.n_layers)]
    rows = rows_of(model, value.reference, "reference")
    by_pos = all(len(row) == into.shape[1] for row in rows)
    if site == "pattern" and not by_pos:
        raise InputError("a mean pattern needs reference prompts of the patched prompts' length")
    sums: dict[str, Tensor] = {}
    for row in rows:  # one at a time: sums of every layer are held, never the activations of every prompt
        _, cache = model.run_with_cache(row[None], names=names, stop_at_layer=model.cfg.n_layers)
        for name in names:
            found = cache[name] if by_pos else cache[name].sum(1, keepdim=True)
            sums[name] = sums[name] + found if name in sums else found
    n = len(rows) if by_pos else sum(map(len, rows))
    return {name: total / n for name, total in sums.items()}


def aligned(model, into: Tensor, other: Tensor, site: str) -> dict[str, Tensor]:
    """The other run's activations at the positions that both prompts share, the base run's own between."""
    if site == "pattern":
        raise InputError("patterns of prompts of different length cannot be matched; patch z, or re-word the prompts")
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
