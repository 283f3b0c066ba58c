"""What a path-patching sweep needs before it knows its metric: both runs, the senders and the receivers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.core.hooks import HookFn
from hooklens.model.kv_cache import KVCache
from hooklens.model.linear import is_plain
from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.nodes import Order, Receiver, Sender, on_tokens
from hooklens.sweeps.planning import first_difference

#: Receivers read the live stream with the sender's new value in it.
EDGES = "edges"
#: Receivers hold what they read while the other heads were frozen, MLPs recomputed (Wang et al. 2022, appendix B).
FIXED = "fixed receivers"
#: The same with the MLPs frozen too: receivers hold what the sender alone changes.
FIXED_FROZEN = "fixed receivers, MLPs frozen"


Mixed = Float[Tensor, "cell head d_head"]


@dataclass(eq=False)
class PathRun:
    """What is kept of a run: the streams between blocks, what attention and MLPs add, z, and the keys and values."""

    streams: dict[int, Tensor]
    attn_out: dict[int, Tensor] = field(default_factory=dict)
    mlp_out: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    past: KVCache = field(default_factory=KVCache)

    def of(self, sender: Sender) -> Float[Tensor, "pair pos d"]:
        """The activation that a sender sends: its z, what the MLP adds, or the embedding."""
        if sender.kind == "embed":
            return self.streams[0]
        return self.mlp_out[sender.layer] if sender.kind == "mlp" else self.z[sender.layer][:, :, sender.head]

    def written(self, sender: Sender) -> tuple[tuple[str, int], Float[Tensor, "pair pos d_model"]]:
        """The point at which the sender has reached the stream, and what is there."""
        if sender.kind == "embed":
            return ("resid_pre", 0), self.streams[0]
        name, acts = ("mlp_out", self.mlp_out) if sender.kind == "mlp" else ("attn_out", self.attn_out)
        return (name, sender.layer), acts[sender.layer]


@dataclass(frozen=True, eq=False)
class PathPlan:
    """One patch for every sender, whose value of the other run the receivers read."""

    model: HookedTransformer
    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]
    semantics: str
    tokens: Shaped[Tensor, "pair pos *d_in"]
    other: Shaped[Tensor, "pair pos *d_in"]
    base: PathRun
    new: PathRun
    first_change: Int[Tensor, "pair"]

    @cached_property
    def causal(self) -> bool:
        """Can a change at a position reach nothing before it?"""
        return self.model.cfg.causal

    @cached_property
    def order(self) -> Order:
        """The order in which the components of the model read and write."""
        return Order(self.model)

    @cached_property
    def stages(self) -> list[int]:
        """Where there is a receiver, lowest first."""
        return sorted({self.order.reads_at(receiver) for receiver in self.receivers})

    @cached_property
    def reading(self) -> list[tuple[str, int]]:
        """The kind and layer of every receiver, each once."""
        return list(dict.fromkeys((receiver.kind, receiver.layer) for receiver in self.receivers))

    def heads_at(self, kind: str, layer: int) -> list[int]:
        """The heads whose q, k or v is a receiver at a layer."""
        heads = (r.head for r in self.receivers if r.kind == kind and r.layer == layer and r.head is not None)
        return list(dict.fromkeys(heads))

    def where(self, kind: str, layer: int) -> Bool[Tensor, "pair pos head"] | None:
        """Where the receivers of this kind read, heads as in `heads_at` (else one column); None: at all positions."""
        some = [r for r in self.receivers if (r.kind, r.layer) == (kind, layer)]
        if all(r.pos is None for r in some):
            return None
        heads: list[int | None] = [*self.heads_at(kind, layer)] or [None]
        where = torch.zeros(*self.tokens.shape[:2], len(heads), dtype=torch.bool, device=self.tokens.device)
        for node in some:
            where[:, :, heads.index(node.head)] |= self.here(node)
        return where

    def here(self, node: Sender | Receiver) -> Bool[Tensor, "pair pos"]:
        """The positions at which a node sends or reads."""
        if node.pos is None:
            return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)
        assert isinstance(node.pos, tuple)  # since `on_tokens`
        pos = torch.tensor(node.pos, device=self.tokens.device)
        return torch.arange(self.tokens.shape[1], device=pos.device) == pos[:, None]

    def moves_keys(self, layer: int) -> bool:
        """Is some key or value of the layer a receiver?"""
        return bool(self.heads_at("k", layer) or self.heads_at("v", layer))

    def enters(self, sender: Sender) -> int | None:
        """The first stage at which a receiver reads the sender; None where all of them come before it."""
        first = self.order.feeds_from(sender)
        return next((stage for stage in self.stages if stage >= first), None)

    def start(self, sender: Sender) -> Int[Tensor, "pair"]:
        """The first position that can change, for every pair: where the sender has sent, and some receiver reads."""
        if not self.causal:
            return torch.zeros_like(self.first_change)
        return torch.stack((self.first_change, self.here(sender).long().argmax(1), self._first_read)).amax(0)

    @cached_property
    def _first_read(self) -> Int[Tensor, "pair"]:
        read = torch.stack([self.here(receiver) for receiver in self.receivers]).any(0)
        return read.long().argmax(1)


def point_of(model: HookedTransformer, kind: str, layer: int) -> tuple[str, int]:
    """The hook point whose activation receivers of a kind read: the stream for the final norm."""
    return ("resid_post", model.cfg.n_layers - 1) if kind == "final" else (kind, layer)


def plan_paths(
    model: HookedTransformer,
    tokens: Shaped[Tensor, "pair pos *d_in"],
    other: Shaped[Tensor, "pair pos *d_in"],
    senders: Sequence[Sender],
    receivers: Sequence[Receiver],
    semantics: str,
) -> PathPlan:
    """Run both prompts and keep what the paths start from: `tokens` is patched, `other` gives the new values."""
    senders, receivers = on_tokens(senders, *tokens.shape[:2]), on_tokens(receivers, *tokens.shape[:2])
    _refuse(model, receivers, semantics)
    every = range(model.cfg.n_layers)
    kept = {"hook_resid_pre": every, "hook_attn_out": every, "attn.hook_z": every}
    kept |= {} if model.cfg.attn_only else {"hook_mlp_out": every}
    sending = {"hook_resid_pre": {0}, "attn.hook_z": set(), "hook_mlp_out": set()}
    for sender in senders:
        if sender.kind != "embed":
            sending["attn.hook_z" if sender.kind == "head" else "hook_mlp_out"].add(sender.layer)
    with torch.no_grad():
        base, new = _run(model, tokens, kept), _run(model, other, sending)
    plan = PathPlan(
        model=model,
        senders=senders,
        receivers=receivers,
        semantics=semantics,
        tokens=tokens,
        other=other,
        base=base,
        new=new,
        first_change=first_difference(tokens, other),
    )
    if all(plan.enters(sender) is None for sender in senders):
        names = ", ".join(receiver.name for receiver in receivers[:4])
        raise InputError(
            f"no sender reaches {names}: a path leads upwards, and of {len(senders)} senders the first is "
            f'{senders[0].name}; choose later receivers, or senders=["embed"], which reaches all'
        )
    return plan


def _refuse(model: HookedTransformer, receivers: Sequence[Receiver], semantics: str) -> None:
    model.blocks[0].need_sum("path patching")
    if semantics != EDGES and len(receivers) > 1 and any(r.kind == "final" for r in receivers):
        raise InputError(
            "with fixed receivers the final stream is held as it was recorded, so that nothing held below it could "
            f'count; {len(receivers)} receivers were given. Ask for "final" alone, or leave Fixed out'
        )


def _run(model: HookedTransformer, tokens: Tensor, points: Mapping[str, Iterable[int]]) -> PathRun:
    """A run of which the activations at these points of these layers are kept."""
    past, n = KVCache(), model.cfg.n_layers
    names = [f"blocks.{layer}.{point}" for point, layers in points.items() for layer in layers]
    last, cache = model.run_with_cache(tokens, names, stop_at_layer=n, kv_cache=past)
    kept = {name: {layer: cache[f"blocks.{layer}.{name}"] for layer in layers} for name, layers in points.items()}
    return PathRun(
        streams=kept["hook_resid_pre"] | {n: last},
        attn_out=kept.get("hook_attn_out", {}),
        mlp_out=kept.get("hook_mlp_out", {}),
        z=kept["attn.hook_z"],
        past=past,
    )


def sent(
    plan: PathPlan, sender: Sender, pair: Int[Tensor, "cell"], pos: Int[Tensor, "cell"]
) -> Float[Tensor, "cell d_model"]:
    """By how much the stream changes at these pairs and positions when the sender takes its new value (where it sends).

    Where a head reaches the stream through a norm of the whole layer, the change is that of the norm's
    output when this head alone is exchanged.
    """
    if sender.head is None:
        change = plan.new.of(sender)[pair, pos] - plan.base.of(sender)[pair, pos]
    else:
        old, new = (run.z[sender.layer][pair, pos] for run in (plan.base, plan.new))
        change = heads_write(plan, sender.layer, pair=pair, pos=pos, old=old, new=new, heads=[sender.head])
    if sender.pos is not None:
        change = change * plan.here(sender)[pair, pos, None]
    return change if sender.turned is None else turn(change, sender.turned)


def heads_write(
    plan: PathPlan, layer: int, pair: Tensor, pos: Tensor, old: Mixed, new: Mixed, heads: list[int]
) -> Float[Tensor, "cell d_model"]:
    """By how much attn_out changes when these heads' z goes from old to new."""
    block, attn = plan.model.blocks[layer], plan.model.blocks[layer].attn
    if is_plain(attn.o):
        change = torch.einsum("chd,hdm->cm", new[:, heads] - old[:, heads], attn.W_O[heads])
    else:
        change = (attn.results(new[None]) - attn.results(old[None]))[0, :, heads].sum(1)
    if block.writes_through("attn").open:
        return change
    raw = attn.o(old.flatten(1))
    return block.attn_adds(raw + change) - plan.base.attn_out[layer][pair, pos]


def turn(change: Float[Tensor, "*cell d_model"], seed: int) -> Float[Tensor, "*cell d_model"]:
    """The same lengths and angles in other directions: coordinates shuffled, signs drawn."""
    generator = seeded(seed)
    order = torch.randperm(change.shape[-1], generator=generator)
    signs = torch.randint(2, (change.shape[-1],), generator=generator) * 2 - 1
    return change[..., order.to(change.device)] * signs.to(change)


def receiver_heads(linear, normed: Float[Tensor, "*cell d_model"], heads: list[int], d_head: int) -> Tensor:
    """q, k or v of some heads only, from what they read."""
    if not is_plain(linear):
        return linear(normed).unflatten(-1, (-1, d_head))[..., heads, :]
    weight = linear.weight.view(-1, d_head, linear.weight.shape[1])[heads].flatten(0, 1)
    bias = None if linear.bias is None else linear.bias.view(-1, d_head)[heads].flatten()
    return torch.nn.functional.linear(normed, weight, bias).unflatten(-1, (-1, d_head))


def writing(
    value: Float[Tensor, "row pos *heads d"], where: Bool[Tensor, "row pos some_head"] | None, heads: list[int] | None
) -> HookFn:
    """A hook that writes a value at the positions `where` (None: all), in some heads (None: there are no heads)."""

    def write(act: Tensor, hook: Any) -> Tensor:
        if heads is None:
            return value if where is None else torch.where(where, value, act)
        act[:, :, heads] = value if where is None else torch.where(where[..., None], value, act[:, :, heads])
        return act

    return write
