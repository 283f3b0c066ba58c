"""Path patching once more, apart from the library's own: whole forward passes with hooks, written for reading."""

from collections.abc import Callable

import torch
from torch import Tensor

from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.path import Fixed

Sender = tuple  # ("head", layer, head), ("mlp", layer), ("embed",)
Receiver = tuple  # ("q" | "k" | "v", layer, head), ("mlp_in", layer), ("final",)
#: How the receivers of each variant are given.
HELD = {"edges": lambda asked: asked, "fixed": Fixed, "frozen": lambda asked: Fixed(asked, mlps="frozen")}


def change_of(model: HookedTransformer, base: Tensor, new: Tensor, sender: Sender) -> Tensor:
    """By how much what the sender adds to the stream differs between its old and its new value."""
    kind = sender[0]
    if kind == "embed":
        a, b = (model.run_with_cache(tokens, "blocks.0.hook_resid_pre")[1] for tokens in (base, new))
        return b["blocks.0.hook_resid_pre"] - a["blocks.0.hook_resid_pre"]
    layer = sender[1]
    point = (f"{'attn' if kind == 'head' else 'mlp'}_out", layer)
    old = model.run_with_cache(base, point)[1][point]
    if kind == "mlp":
        return model.run_with_cache(new, point)[1][point] - old
    z = model.run_with_cache(new, ("z", layer))[1]["z", layer]

    def write(act, hook):
        act[:, :, sender[2]] = z[:, :, sender[2]]
        return act

    with model.hooks([(("z", layer), write)]):
        return model.run_with_cache(base, point)[1][point] - old


def comes_before(model: HookedTransformer, sender: Sender, receiver: Receiver) -> bool:
    if sender[0] == "embed" or receiver[0] == "final":
        return True
    block = model.blocks[0]
    if receiver[0] == "mlp_in" and sender[0] == "head" and block.mlp_reads_attn:
        return sender[1] <= receiver[1]
    if receiver[0] in ("q", "k", "v") and sender[0] == "mlp" and block.attn_reads_mlp:
        return sender[1] <= receiver[1]
    return sender[1] < receiver[1]


def edges(
    model: HookedTransformer,
    base: Tensor,
    new: Tensor,
    metric: Callable,
    sender: Sender,
    receivers: list[Receiver],
    send_at=None,
    read_at=None,
) -> Tensor:
    """Each receiver reads the live stream plus the sender's change, at its positions."""
    change, hooks, live = change_of(model, base, new, sender) * there(base, send_at) * there(base, read_at), [], {}
    for receiver in receivers:
        if not comes_before(model, sender, receiver):
            continue
        if receiver[0] == "final":
            hooks.append((("resid_post", model.cfg.n_layers - 1), lambda act, hook: act + change))
        elif receiver[0] == "mlp_in":
            hooks.append((receiver, lambda act, hook: act + change))
        else:
            hooks += _reading_anew(model, *receiver, lambda layer: live[layer] + change, live)
    return metric(model.run_with_hooks(base, fwd_hooks=hooks))


def fixed(
    model: HookedTransformer,
    base: Tensor,
    new: Tensor,
    metric: Callable,
    sender: Sender,
    receivers: list[Receiver],
    *,
    mlps: bool,
    send_at=None,
    read_at=None,
) -> Tensor:
    """Record with the heads frozen (and the MLPs, unless `mlps`), then hold what was recorded."""
    names = ["attn_out"] + ([] if mlps or model.cfg.attn_only else ["mlp_out"])
    _, kept = model.run_with_cache(base, names)
    change, n = change_of(model, base, new, sender) * there(base, send_at), model.cfg.n_layers
    at = {"head": ("attn_out", *sender[1:2]), "mlp": ("mlp_out", *sender[1:2]), "embed": ("resid_pre", 0)}[sender[0]]
    hooks = [
        ((name, layer), lambda act, hook, name=name, layer=layer: kept[name, layer])
        for name in names
        for layer in range(n)
    ]
    if sender[0] == "mlp":  # its own live value would already hold nothing new: the heads below are frozen
        own = model.run_with_cache(base, at)[1][at]
        hooks.append((at, lambda act, hook: own + change))
    else:
        hooks.append((at, lambda act, hook: act + change))
    seen: dict = {}

    def record(act, hook):
        seen[hook.name] = act.clone()

    points = [("resid_post", n - 1) if r[0] == "final" else (r[0], r[1]) for r in receivers]
    model.run_with_hooks(base, fwd_hooks=hooks + [(point, record) for point in dict.fromkeys(points)])
    held = []
    for receiver, point in zip(receivers, points, strict=True):
        (name,) = (point.name for point in model.resolve(point))

        def hold(act, hook, receiver=receiver):
            at = there(base, read_at).expand(-1, -1, act.shape[-1])
            if len(receiver) < 3:
                return torch.where(at, seen[hook.name], act)
            act[:, :, receiver[2]] = torch.where(at, seen[hook.name][:, :, receiver[2]], act[:, :, receiver[2]])
            return act

        held.append((name, hold))
    return metric(model.run_with_hooks(base, fwd_hooks=held))


def _reading_anew(model, kind: str, layer: int, head: int, stream: Callable, live: dict) -> list:
    """Hooks that keep the live stream, and write what one head makes of another stream."""
    block, linear = model.blocks[layer], getattr(model.blocks[layer].attn, kind)

    def keep(act, hook):
        live[layer] = act.clone()

    def write(act, hook):
        read = stream(layer)
        normed = read if block.ln1 is None else block.ln1.fused(read)
        act[:, :, head] = linear(normed).unflatten(-1, (-1, block.attn.d_head))[:, :, head]
        return act

    return [(("resid_mid" if block.attn_reads_mlp else "resid_pre", layer), keep), ((kind, layer), write)]


def there(tokens: Tensor, at) -> Tensor:
    """Which cells are at a position, one a pair; without one all are."""
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for pair, row in enumerate(mask):
        row[slice(None) if at is None else at[pair]] = True
    return mask[..., None]


def reference(
    model, base, new, metric, semantics: str, sender: Sender, receivers: list[Receiver], send_at=None, read_at=None
) -> Tensor:
    """The metric of one sender in one of the three semantics."""
    at = {"send_at": send_at, "read_at": read_at}
    with torch.no_grad():
        if semantics == "edges":
            return edges(model, base, new, metric, sender, receivers, **at)
        return fixed(model, base, new, metric, sender, receivers, mlps=semantics == "fixed", **at)
