"""The plain loop once more, apart from the library's own: one hooked forward pass a patch, the metric of its logits."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from hooklens.core.names import axes
from hooklens.model.transformer import HookedTransformer

POINTS = {
    **{name: f"hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{name: f"attn.hook_{name}" for name in ("q", "k", "v", "z", "pattern", "result")},
    "post": "mlp.hook_post",
}
BYS = {
    **dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), ("layer x pos", "layer")),
    **dict.fromkeys(("q", "k", "v", "z", "pattern", "result"), ("layer x head", "layer x head x pos")),
    "post": ("layer x pos", "layer x neuron", "layer x neuron x pos"),
}
_AXIS = {"pos": ("pos", "query_pos"), "head": ("head", "kv_head"), "neuron": ("d_mlp",)}
Metric = Callable[[Tensor], Tensor]


def has(model: HookedTransformer, site: str) -> bool:
    return f"blocks.0.{POINTS[site]}" in model.hook_names()


def looped(
    model: HookedTransformer, tokens: Tensor, values: Tensor | Callable, metric: Metric, site: str, by: str
) -> Tensor:
    """The metric of every patch, pair first. `values`: tokens whose activations are written, or a function."""
    names = [f"blocks.{layer}.{POINTS[site]}" for layer in range(model.cfg.n_layers)]
    old = model.run_with_cache(tokens, names=names)[1]
    new = model.run_with_cache(values, names=names)[1] if isinstance(values, Tensor) else None
    grid = by.split(" x ")
    dims = axes(names[0])
    sizes = [len(names)] + [
        next(n for axis, n in zip(dims, old[names[0]].shape, strict=True) if axis in _AXIS[x]) for x in grid[1:]
    ]
    out = torch.empty(len(tokens), *sizes, dtype=old[names[0]].dtype)
    with torch.no_grad():
        for index in itertools.product(*map(range, sizes)):
            name = names[index[0]]
            at = tuple(
                next((i for x, i in zip(grid[1:], index[1:], strict=True) if axis in _AXIS[x]), slice(None))
                for axis in dims
            )
            written = values(old[name]) if new is None else new[name]

            def write(act: Tensor, hook, at=at, written=written) -> Tensor:
                act[at] = written.expand_as(act)[at]
                return act

            logits = model.run_with_hooks(tokens, fwd_hooks=[(name, write)])
            out[(slice(None), *index)] = metric(logits)
    return out
