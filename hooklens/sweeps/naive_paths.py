"""Path patching as hooked forward passes, one or two a sender: what the engine is held to, and its fallback."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.hooks import HookFn
from hooklens.sweeps.naive import Hooks, under_hooks
from hooklens.sweeps.nodes import Sender
from hooklens.sweeps.paths import EDGES, PathPlan, sent

if TYPE_CHECKING:
    from hooklens.sweeps.measure import Reader


def plain_paths(plan: PathPlan, senders: Sequence[Sender], reader: "Reader") -> Float[Tensor, "sender pair"]:
    """The metric of some senders' patches, one after the other."""
    return torch.cat([under_hooks(reader, plan.tokens, _patching(plan, sender)) for sender in senders])


def _patching(plan: PathPlan, sender: Sender) -> Hooks:
    """One sender's patch as hooks on the run that is patched."""
    if plan.semantics == EDGES:
        return _adding(plan, sender)
    held = _recorded(plan, sender)
    last = plan.model.cfg.n_layers - 1
    if any(r.kind == "final" for r in plan.receivers):
        return [(("resid_post", last), _only(plan.where("final", -1), held["resid_post", last]))]
    return [(point, _holding(plan, point, value)) for point, value in held.items()]


def _adding(plan: PathPlan, sender: Sender) -> Hooks:
    """Each receiver that comes after the sender gets its new value in what it reads, and nothing else does."""
    n_pair, n_pos = plan.tokens.shape
    every = torch.arange(n_pair * n_pos, device=plan.tokens.device)
    change = sent(plan, sender, every // n_pos, every % n_pos).view(n_pair, n_pos, -1)
    hooks: list[tuple[Any, HookFn]] = []
    for (kind, layer), receiver in {(r.kind, r.layer): r for r in plan.receivers}.items():
        if plan.order.reads_at(receiver) < plan.order.feeds_from(sender):
            continue
        where = plan.where(kind, layer)
        if kind in ("q", "k", "v"):
            hooks.append(((f"{kind}_input", layer), _adding_to(change, where, plan.heads_at(kind, layer))))
        else:
            point = ("mlp_in", layer) if kind == "mlp_in" else ("resid_post", plan.model.cfg.n_layers - 1)
            hooks.append((point, _adding_to(change, where)))
    return hooks


def _adding_to(change: Tensor, where: Tensor | None, heads: list[int] | None = None) -> HookFn:
    by_head = change[:, :, None] if where is None else change[:, :, None] * where[..., None]

    def add(act: Tensor, hook: Any) -> Tensor:
        if heads is None:
            return act + by_head[:, :, 0]
        act[:, :, heads] += by_head
        return act

    return add


def _only(where: Tensor | None, value: Tensor) -> HookFn:
    """Replaces an activation, or that of the positions where its receiver reads."""
    return lambda act, hook: value if where is None else torch.where(where, value, act)


def _points(plan: PathPlan) -> list[tuple[str, int]]:
    last = plan.model.cfg.n_layers - 1
    return list(dict.fromkeys((r.kind, r.layer) if r.kind != "final" else ("resid_post", last) for r in plan.receivers))


def _recorded(plan: PathPlan, sender: Sender) -> dict[tuple[str, int], Tensor]:
    """What stands at the receivers' points when the sender takes its new value and the other heads keep theirs."""
    model = plan.model
    values, layer, here = dict(plan.frozen), sender.layer, plan.here(sender)[..., None]
    if sender.kind == "embed":
        values["resid_pre", 0] = torch.where(here, plan.new.streams[0], plan.base.streams[0])
    elif sender.kind == "mlp":
        values["mlp_out", layer] = torch.where(here, plan.new.mlp_out[layer], plan.base.mlp_out[layer])
    else:
        values["z", layer], at = values["z", layer].clone(), (slice(None), slice(None), sender.head)
        values["z", layer][at] = torch.where(here, plan.new.z[layer][at], plan.base.z[layer][at])
    hooks = [(point, _replacing(value)) for point, value in values.items()]
    with model.hooks(hooks):
        _, seen = model.run_with_cache(plan.tokens, _points(plan), stop_at_layer=1 + max(x for _, x in _points(plan)))
    return {point: seen[point] for point in _points(plan)}


def _replacing(value: Tensor) -> HookFn:
    return lambda act, hook: value


def _holding(plan: PathPlan, point: tuple[str, int], value: Tensor) -> HookFn:
    heads, where = plan.heads_at(*point), plan.where(*point)

    if point[0] == "mlp_in":
        return _only(where, value)

    def hold(act: Tensor, hook: Any) -> Tensor:
        held = value[:, :, heads]
        act[:, :, heads] = held if where is None else torch.where(where[..., None], held, act[:, :, heads])
        return act

    return hold
