"""The patches of paths as the engine runs them: only senders that reach a receiver, only rows that can change."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.cache import ActivationCache
from hooklens.core.hooks import HookFn
from hooklens.core.names import Where
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import first_nonfinite
from hooklens.sweeps.nodes import Sender
from hooklens.sweeps.path_rows import is_late, stage_of, walk_paths
from hooklens.sweeps.paths import EDGES, FIXED, FIXED_FROZEN, PathPlan, point_of, turn, writing
from hooklens.sweeps.protocol import Item, Sweep
from hooklens.sweeps.settings import current


class PathPatches(Sweep):
    """One patch a sender: rows join the base run where a receiver first reads it, and go on live."""

    title, unit, steps = "patching paths", "senders", True

    def __init__(self, plan: PathPlan):
        self.plan, self.model, self.tokens = plan, plan.model, plan.tokens

    def __len__(self) -> int:
        return len(self.plan.senders)

    @property
    def stream(self) -> Float[Tensor, "pair pos d_model"]:
        return self.plan.base.streams[self.model.cfg.n_layers]

    def name_of(self, number: int) -> str:
        return f"the patch of {self.plan.senders[number].name}"

    def layer_of(self, number: int) -> int:
        return self.plan.senders[number].layer

    def loop(self) -> Sequence[int]:
        return [i for i, sender in enumerate(self.plan.senders) if self.plan.enters(sender) is not None]

    def live(self, reader: Reader) -> list[Item]:
        plan, n_pos, items = self.plan, self.tokens.shape[1], []
        for number in self.loop():
            sender = plan.senders[number]
            starts = plan.start(sender)
            dead = (starts >= n_pos) | (plan.first_change >= n_pos)
            if plan.causal and reader.read is not None:
                dead = dead | (starts > reader.read.amax(1))
            for pair in (~(dead | self._same(sender))).nonzero().flatten().tolist():
                items.append(Item(number, pair, int(starts[pair])))
        return items

    def _same(self, sender: Sender) -> Bool[Tensor, "pair"]:
        """For which pairs has the sender the same value in both runs, where it sends?"""
        old, new = self.plan.base.of(sender), self.plan.new.of(sender)
        return ((old == new).all(-1) | ~self.plan.here(sender)).all(1)

    def rows_at_once(self, memory: int) -> int:
        # beside its stream a row has its sender's change, and what was recorded at every stage
        recorded = len(self.plan.stages) if self.plan.semantics == FIXED else 0
        return super().rows_at_once(memory // (3 + recorded))

    def walk(self, reader: Reader, items: Sequence[Item]) -> list[Tensor]:
        return walk_paths(self.plan, reader, items)

    def checks(self, drawn: Sequence[int], n: int, reader: Reader) -> list[list[int]]:
        """One sender of every layer first, and more than n of them as far as this costs no more than n passes."""
        if not n or self.plan.semantics != EDGES:
            return super().checks(drawn, n, reader)
        n_layers, tokens = self.model.cfg.n_layers, len(self.tokens) * self.tokens.shape[1]
        # each sender takes its own block, and those from the first receiver on
        at_most = min(n * n_layers // (1 + n_layers - self._first), self.rows_at_once(current().memory) // tokens)
        of_layers = {self.layer_of(number): number for number in reversed(drawn)}
        first = [number for number in drawn if of_layers[self.layer_of(number)] == number]
        if (n_more := min(at_most, len(first))) > n:
            return [first[:n_more]]
        return super().checks([*first, *(number for number in drawn if number not in first)], n, reader)

    @property
    def _first(self) -> int:
        """The layer from which on a receiver reads."""
        return min(self.plan.stages[0] // 2, self.model.cfg.n_layers - 1)

    def plain(self, numbers: Sequence[int], reader: Reader) -> Float[Tensor, "sender pair"]:
        senders = [self.plan.senders[i] for i in numbers]
        if len(senders) > 1 and self.plan.semantics == EDGES:  # all rows are the base run's up to the first receiver
            first, hooks = self._first, _adding(self.plan, senders, whole=False)
            return reader.under_hooks(self.plan.base.streams[first], hooks, len(senders), start_at_layer=first)
        return torch.cat([reader.under_hooks(self.tokens, _patching(self.plan, sender)) for sender in senders])

    def share(self, reader: Reader, items: Sequence[Item]) -> float:
        """Token-layers that were computed, MLPs on the path counted whole, over those of the plain loop."""
        plan, (n_pair, n_pos), n_layers = self.plan, self.tokens.shape[:2], self.model.cfg.n_layers
        passes = 1 if plan.semantics == EDGES or plan.stages[-1] == plan.order.end else 2
        done = 0
        for item in items:
            stage, late = stage_of(plan, item), reader.read is not None and is_late(plan, reader, item)
            width = reader.read.shape[1] if late and reader.read is not None else n_pos - item.start
            done += (n_layers - stage // 2) * width
            if plan.semantics == FIXED:
                done += (plan.stages[-1] // 2 - max(plan.senders[item.patch].layer, 0)) * width
        return done / max(1, passes * len(self) * n_pair * n_layers * n_pos)

    def asked(self) -> tuple[Any, Mapping[str, Any]]:
        plan = self.plan
        return ("paths", plan.semantics, plan.senders, plan.receivers, plan.tokens, plan.other), {}

    def sketch(self) -> Sequence[Float[Tensor, "..."]]:
        return [self.plan.new.streams[self.model.cfg.n_layers]]

    def fault(self, said: str, values: Float[Tensor, "sender pair"]) -> str:
        plan, runs = self.plan, ("the run that is patched", "the run that gives the new values")
        for tokens, name in zip((plan.tokens, plan.other), runs, strict=True):
            point = first_nonfinite(plan.model, tokens)
            if point is not None:
                return f"the metric is {said}: in {name} activations are not finite from {point} on"
        bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
        names = ", ".join(plan.senders[i].name for i in bad[:3]) or "the base run"
        return f"the metric is {said} for {names}, though both runs are finite: look at the metric"


def _patching(plan: PathPlan, sender: Sender) -> list[tuple[Where, HookFn]]:
    """One sender's patch as hooks on the run that is patched."""
    if plan.semantics == EDGES:
        return _adding(plan, [sender])
    points = {place: point_of(plan.model, *place) for place in plan.reading}
    seen = _seen(plan, sender, [*points.values()])
    hooks: list[tuple[Where, HookFn]] = []
    for (kind, layer), point in points.items():
        heads = plan.heads_at(kind, layer) or None
        value = seen[point] if heads is None else seen[point][:, :, heads]
        hooks.append((point, writing(value, plan.where(kind, layer), heads)))
    return hooks


def _adding(plan: PathPlan, senders: Sequence[Sender], *, whole: bool = True) -> list[tuple[Where, HookFn]]:
    """Each receiver that comes after a sender gets its new value in what it reads, and nothing else does.

    There is a row of every pair for every sender.
    """
    changes = [_change(plan, sender, whole=whole) for sender in senders]
    receivers = {(receiver.kind, receiver.layer): receiver for receiver in plan.receivers}
    hooks: list[tuple[Where, HookFn]] = []
    for kind, layer in plan.reading:
        stage = plan.order.reads_at(receivers[kind, layer])
        reaches = [stage >= plan.order.feeds_from(sender) for sender in senders]
        if not any(reaches):
            continue
        heads, where = plan.heads_at(kind, layer) or None, plan.where(kind, layer)
        # heads read copies of the stream of their own
        point = point_of(plan.model, kind, layer) if heads is None else (f"{kind}_input", layer)
        rows = torch.cat([change * reached for change, reached in zip(changes, reaches, strict=True)])
        hooks.append((point, _adding_to(rows, None if where is None else where.repeat(len(senders), 1, 1), heads)))
    return hooks


def _change(plan: PathPlan, sender: Sender, *, whole: bool) -> Float[Tensor, "pair pos d_model"]:
    """What the forward pass adds to the stream beyond the base run; what the block says of itself is not asked.

    Unless it is `whole`, the pass is that of the sender's block alone.
    """
    point, old = plan.base.written(sender)
    if sender.kind == "head" or whole:
        new = _seen(plan, sender, [point], start=None if whole else sender.layer)[point]
    else:
        new = plan.new.of(sender)
    change = (new - old) * plan.here(sender)[..., None]
    return change if sender.turned is None else turn(change, sender.turned)


def _adding_to(change: Tensor, where: Tensor | None, heads: list[int] | None) -> HookFn:
    by_head = change[:, :, None] if where is None else change[:, :, None] * where[..., None]

    def add(act: Tensor, hook: Any) -> Tensor:
        if heads is None:
            return act + by_head[:, :, 0]
        act[:, :, heads] += by_head
        return act

    return add


def _seen(
    plan: PathPlan, sender: Sender, points: Sequence[tuple[str, int]], *, start: int | None = None
) -> ActivationCache:
    """Activations of the forward pass in which the sender takes its new value and the other heads keep theirs.

    `start`: the layer at which it begins, with the base run's stream.
    """
    value = torch.where(plan.here(sender)[..., None], plan.new.of(sender), plan.base.of(sender))
    values = {("z", layer): z for layer, z in plan.base.z.items()}
    if plan.semantics == FIXED_FROZEN:
        values |= {("mlp_out", layer): out for layer, out in plan.base.mlp_out.items()}
    if sender.kind == "head":
        values["z", sender.layer] = values["z", sender.layer].clone()
        values["z", sender.layer][:, :, sender.head] = value
    else:
        values[plan.base.written(sender)[0]] = value
    given, stop = plan.tokens if start is None else plan.base.streams[start], 1 + max(layer for _, layer in points)
    passed = {point: new for point, new in values.items() if (start or 0) <= point[1] < stop}
    with plan.model.hooks([(point, writing(new, None, None)) for point, new in passed.items()]):
        return plan.model.run_with_cache(given, points, start_at_layer=start, stop_at_layer=stop)[1]
