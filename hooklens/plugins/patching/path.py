"""Path patching: some readers of the residual stream see a component's value of the other run, all others do not."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hooklens.core.errors import InputError, did_you_mean
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts, check_prompts_differ, read_pairs
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.patching.path_sweep import PathSweep
from hooklens.plugins.patching.two_runs import ends_of, joined, resume_of, with_other
from hooklens.results.statistics import group_numbers
from hooklens.sweeps.execution import execute
from hooklens.sweeps.nodes import Order, Receiver, Sender, of_pairs, read_receivers, read_senders
from hooklens.sweeps.path_patches import PathPatches
from hooklens.sweeps.paths import EDGES, FIXED, FIXED_FROZEN, PathPlan, plan_paths
from hooklens.sweeps.replacement import Value, as_replacement, is_run
from hooklens.sweeps.resume import Resume, hint, products_of

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True)
class Fixed:
    """Receivers that hold a value: what they read when the sender changes while every other head keeps its own.

    `mlps`: "recomputed" (Wang et al.) or "frozen" while that is recorded. Then the base run goes again with the
    receivers held at it. `Fixed("final")` stands alone, as nothing held below the final norm could count.

    With frozen MLPs and one receiver this is `path_patch` without `Fixed`. With several, a higher one holds what the
    sender alone changes in it, while without `Fixed` it also reads what the lower ones do.

    Reference: Wang et al. (2022), "Interpretability in the Wild", appendix B.
    """

    receivers: Any = "final"
    mlps: str = "recomputed"

    def __post_init__(self) -> None:
        if self.mlps not in ("recomputed", "frozen"):
            raise did_you_mean("way to treat MLPs", str(self.mlps), ("recomputed", "frozen"))


def path_patch(
    model: "HookedTransformer",
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    receivers: Any = "final",
    senders: Any = None,
    value: Value = "clean",
    resume: str | Path | Resume | None = None,
) -> PathSweep:
    """What does each component tell these readers? Only the edges from sender to receivers carry its new value.

    A receiver reads the live stream in which the sender has its value of the other run; the sender itself, and whatever
    comes after the receivers, is live. With every receiver (`receivers="all"`) this is activation patching.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import logit_diff
    >>> model = tiny_model(); clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    >>> metric = logit_diff(model, answer=5, wrong_answer=6)
    >>> sweep = path_patch(model, clean, corrupted, metric, receivers=("q", 1, 0))
    >>> sweep.senders, sweep.reaches.tolist()
    (['L0H0', 'L0H1', 'L1H0', 'L1H1', 'MLP0', 'MLP1'], [True, True, False, False, True, False])
    >>> path_patch(model, clean, corrupted, metric, receivers=Fixed("final")).semantics
    'fixed receivers'

    `receivers`, one or a list: ("q", 9, 6) or "L9H6.q", and so "k" and "v" (of a key/value head), ("q", 9) for every
    head of the layer, ("mlp", 9) or "MLP9", "final" (what the final norm reads: the direct path to the logits), "all".
    `Fixed(receivers)` is the procedure of Wang et al., in which a path can lead through MLPs. `senders`: (9, 6) or
    "L9H6", ("mlp", 9) or "MLP9", "embed", "heads", "mlps"; None: all heads and MLPs. Each is patched alone. Senders and
    receivers are meant at all positions; `At("L9H6.q", -1)` or `At("heads", s2, "S2")` means one position, the same in
    every pair or one a pair. `value`: "clean" goes into the corrupted run, "corrupted" into the clean one. `resume`
    names a file in which finished senders are kept, as in `hl.patch`. Where pairs share something, the result's
    `grouped(labels)` takes intervals over groups of them.

    Every norm on the way is recomputed. Sandwich norms join a layer's heads: a head's new value is what the norm makes
    of the layer with this head alone exchanged, so that senders of one layer do not add up. Post-norm blocks have no
    paths and are refused.

    Reference: Goldowsky-Dill et al. (2023), "Localizing Model Behavior with Path Patching", section 3.
    """
    value = _read_run(value)
    into = "corrupted" if value == "clean" else "clean"
    held = receivers if isinstance(receivers, Fixed) else None
    semantics = EDGES if held is None else FIXED if held.mlps == "recomputed" else FIXED_FROZEN
    ends = _Ends(read_senders(model, senders), read_receivers(model, receivers if held is None else held.receivers))
    pairs = as_pairs(model, clean, corrupted, metric)
    groups = _aligned(model, pairs)
    check_metric(pairs.metric, groups)
    file = resume_of(resume, groups)
    with products_of(file), hint(resume, "path_patch"):
        parts, n = [], len(pairs)
        for group in groups:
            made = _plan(model, group, n, ends, semantics=semantics, into=into)
            other = made.new.streams[model.cfg.n_layers]
            outcome = execute(PathPatches(made), group.of(pairs.metric), resume=file, other=other)
            parts.append(with_other(model, outcome, group, value))
    outcome = joined(groups, parts)
    clean_end, corrupted_end = ends_of(outcome, into)
    return PathSweep(
        per_pair=outcome.values.T,
        clean_per_pair=clean_end,
        corrupted_per_pair=corrupted_end,
        senders=[sender.name for sender in ends.senders],
        receivers=[receiver.name for receiver in ends.receivers],
        semantics=semantics,
        into=into,
        place=torch.tensor([[s.layer, -1 if s.head is None else s.head] for s in ends.senders]),
        reaches=_reaches(model, *ends),
        shape=(model.cfg.n_layers, model.cfg.n_heads),
        group=group_numbers(len(clean_end), pairs.group),
        computed=outcome.computed,
        largest_error=outcome.largest_error,
        n_verified=outcome.n_verified,
        how=outcome.how,
        kernel=outcome.kernel,
    )


class _Ends(NamedTuple):
    """The two ends of the paths."""

    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]


def _read_run(value: Value) -> str:
    """The run of the pair whose value is sent."""
    replacement = as_replacement(value)
    if not (is_run(replacement, "clean") or is_run(replacement, "corrupted")):
        raise InputError(
            f"a path carries the value of the pair's other run, value='clean' or 'corrupted'; got {replacement.label!r}"
        )
    return replacement.label


def _aligned(model: "HookedTransformer", pairs: PromptPairs) -> list[Pairs]:
    """Pairs by their length; senders are patched at all positions, so both prompts of a pair have the same."""
    groups = read_pairs(model, pairs.clean, pairs.corrupted, ())
    if not all(one.aligned for one in groups):
        read_pairs(model, pairs.clean, pairs.corrupted, ("pos",))  # raises, and says where they part
    check_prompts_differ(groups)
    return groups


def _plan(model: "HookedTransformer", group: Pairs, n: int, ends: _Ends, *, semantics: str, into: str) -> PathPlan:
    """The paths of the pairs of one length, which are some of n."""
    base, other = (group.corrupted, group.clean) if into == "corrupted" else (group.clean, group.corrupted)
    senders, receivers = of_pairs(ends.senders, group.index, n), of_pairs(ends.receivers, group.index, n)
    return plan_paths(model, base, other=other, senders=senders, receivers=receivers, semantics=semantics)


def _reaches(model: "HookedTransformer", senders: tuple[Sender, ...], receivers: tuple[Receiver, ...]) -> Tensor:
    order = Order(model)
    last = max(order.reads_at(receiver) for receiver in receivers)
    return torch.tensor([order.feeds_from(sender) <= last for sender in senders])


def demo(model: "HookedTransformer") -> PathSweep:
    """Who talks to the query and value of the last layer's first head; with one layer, to the logits."""
    last = model.cfg.n_layers - 1
    receivers = [("q", last, 0), ("v", last, 0)] if last else "final"
    return path_patch(model, demo_pairs(model, 2), receivers=receivers)
