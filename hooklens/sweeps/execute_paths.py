"""Run a path plan: only the senders that reach a receiver, only the rows that can change, many in one matrix."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.progress import progress
from hooklens.model.linear import kernel_of, packed_linears
from hooklens.sweeps.execute import Item, Outcome, run_bins
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import first_nonfinite, not_finite, why_plain
from hooklens.sweeps.naive_paths import plain_path, plain_paths
from hooklens.sweeps.nodes import Sender
from hooklens.sweeps.path_rows import is_late, stage_of, walk_paths
from hooklens.sweeps.paths import EDGES, FIXED, PathPlan
from hooklens.sweeps.settings import Settings, current
from hooklens.sweeps.verify import verify


def execute_paths(plan: PathPlan, metric: Any) -> Outcome:
    """The metric of every sender's patch, exactly as hooked forward passes would give it."""
    settings = current()
    with torch.no_grad(), packed_linears(rows=1024):
        reason, kernel = "asked for" if settings.plain else why_plain(plan.model, steps=True), kernel_of(plan.model)
        reader = Reader(plan.model, metric, plan.base.streams[plan.model.cfg.n_layers])
        values = reader.base.repeat(len(plan.senders), 1)
        if reason is not None:
            _run_plain(plan, reader, values, settings)
            _refuse_nonfinite(plan, values, reader.base)
            return Outcome(
                values=values,
                base=reader.base,
                computed=1.0,
                largest_error=float("nan"),
                n_verified=0,
                how=f"plain loop: {reason}",
                kernel=kernel,
            )
        items = live_paths(plan, reader)
        # beside its stream a row has its sender's change, and what was recorded at every stage
        smaller = settings.memory // (3 + (len(plan.stages) if plan.semantics == FIXED else 0))
        run_bins(
            plan,
            reader,
            items=items,
            values=values,
            kept=None,
            settings=replace(settings, memory=smaller),
            walk=walk_paths,
        )
        _refuse_nonfinite(plan, values, reader.base)
        error, n = verify(plan, reader, {item.patch for item in items}, values, plain_paths)
    return Outcome(
        values=values,
        base=reader.base,
        computed=_share(plan, reader, items),
        largest_error=error,
        n_verified=n,
        how="engine",
        kernel=kernel,
    )


def live_paths(plan: PathPlan, reader: Reader) -> list[Item]:
    """Every (sender, pair) that can move the metric; the others' answer is the base run's."""
    n_pos, items = plan.tokens.shape[1], []
    for number, sender in enumerate(plan.senders):
        if plan.enters(sender) is not None:
            starts = plan.start(sender)
            dead = (starts >= n_pos) | (plan.first_change >= n_pos)
            if plan.causal and reader.read is not None:
                dead = dead | (starts > reader.read.amax(1))
            for pair in (~(dead | _same(plan, sender))).nonzero().flatten().tolist():
                items.append(Item(number, pair, int(starts[pair])))
    return items


def _same(plan: PathPlan, sender: Sender) -> Bool[Tensor, "pair"]:
    """For which pairs has the sender the same value in both runs, where it sends?"""
    if sender.kind == "head":
        old, new = (run.z[sender.layer][:, :, sender.head] for run in (plan.base, plan.new))
    elif sender.kind == "mlp":
        old, new = (run.mlp_out[sender.layer] for run in (plan.base, plan.new))
    else:
        old, new = plan.base.streams[0], plan.new.streams[0]
    return ((old == new).all(-1) | ~plan.here(sender)).all(1)


def _run_plain(plan: PathPlan, reader: Reader, values: Tensor, settings: Settings) -> None:
    todo = [i for i, sender in enumerate(plan.senders) if plan.enters(sender) is not None]
    with progress("patching paths", len(todo), unit="senders") as advance:
        for i in todo:
            values[i] = plain_path(plan, plan.senders[i], reader)
            advance()


def _share(plan: PathPlan, reader: Reader, items: list[Item]) -> float:
    """Token-layers that were worked out, MLPs on the path counted whole, over those of the plain loop."""
    n_layers, n_pos = plan.model.cfg.n_layers, plan.tokens.shape[1]
    passes = 1 if plan.semantics == EDGES or plan.stages[-1] == plan.order.end else 2
    done = 0
    for item in items:
        stage, late = stage_of(plan, item), reader.read is not None and is_late(plan, reader, item)
        width = reader.read.shape[1] if late and reader.read is not None else n_pos - item.start
        done += (n_layers - stage // 2) * width
        if plan.semantics == FIXED:
            done += (plan.stages[-1] // 2 - max(plan.senders[item.patch].layer, 0)) * width
    return done / max(1, passes * len(plan.senders) * len(plan.tokens) * n_layers * n_pos)


def _refuse_nonfinite(plan: PathPlan, values: Float[Tensor, "sender pair"], base: Float[Tensor, "pair"]) -> None:
    """A metric that comes out NaN or infinite is an error that names where it began."""
    said = not_finite(values, base)
    if said is None:
        return
    for tokens, name in ((plan.tokens, "the run that is patched"), (plan.other, "the run that gives the new values")):
        point = first_nonfinite(plan.model, tokens)
        if point is not None:
            raise InputError(f"the metric is {said}: in {name} activations are not finite from {point} on")
    bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
    names = ", ".join(plan.senders[i].name for i in bad[:3]) or "the base run"
    raise InputError(f"the metric is {said} for {names}, though both runs are finite: look at the metric")
