"""Path patching: only some readers of the residual stream see a component's value of the other run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.component import layer_names
from hooklens.core.errors import InputError, did_you_mean
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts, check_prompts_differ, read_aligned
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.patching.two_runs import Swept, ends_of, joined, share_ends, share_of, with_other
from hooklens.results.account import RunAccount
from hooklens.results.result import Result, Table
from hooklens.results.statistics import DRAWS, Ends, Groups, group_numbers, halves, q_values, sign_flip_p
from hooklens.sweeps.execution import execute
from hooklens.sweeps.nodes import Order, of_pairs, read_receivers, read_senders
from hooklens.sweeps.path_patches import PathPatches
from hooklens.sweeps.paths import EDGES, FIXED, FIXED_FROZEN, plan_paths
from hooklens.sweeps.replacement import Value, as_replacement, is_run
from hooklens.sweeps.resume import Resume, resuming

_BARS = 40  # of senders, in a figure


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


@dataclass(frozen=True, eq=False)
class PathSweep(RunAccount, Swept, Result):
    """The metric after each sender was patched into the receivers, beside that of the clean and the corrupted run.

    `semantics` says what the receivers read: see `path_patch` and `Fixed`. `place` is each sender's layer and head (-1:
    none); `reaches` says which senders come before some receiver: the effect of the others is 0. Pairs of one `group`
    share something, see `grouped`: intervals resample groups.
    """

    ranked_by = "change of the metric"

    per_pair: Float[Tensor, "pair sender"]
    clean_per_pair: Float[Tensor, "pair"]
    corrupted_per_pair: Float[Tensor, "pair"]
    senders: list[str]
    receivers: list[str]
    semantics: str
    into: str
    place: Int[Tensor, "sender two"]
    reaches: Bool[Tensor, "sender"]
    shape: tuple[int, int]  # layers, heads
    group: Int[Tensor, "pair"]

    @property
    def share(self) -> Float[Tensor, "sender"]:
        """`effect` over the distance to the run that the new values come from: 0 nothing, 1 all of it.

        Clean into corrupted this is what is recovered. NaN where the two runs do not differ by more than chance.
        """
        return share_of(self.effect, self._gap, self.group)

    def interval(self, level: float = 0.95, *, draws: int = DRAWS, seed: int = 0) -> Ends:
        """Both ends of `share`, by a bootstrap over groups that recomputes both means; NaN for one group."""
        return share_ends(self.moved, self._gap, group=self.group, level=level, draws=draws, seed=seed)

    def grid(self, values: Float[Tensor, "sender"]) -> Float[Tensor, "layer column"]:
        """Numbers by layer and head, MLPs in the last column; NaN where nothing was sent, or nothing reached."""
        n_layers, n_heads = self.shape
        out = torch.full((n_layers, n_heads + 1), float("nan"), dtype=values.dtype)
        for (layer, head), value, reaches in zip(self.place.tolist(), values.tolist(), self.reaches, strict=True):
            if layer >= 0 and reaches:
                out[layer, head] = value  # an MLP's head is -1: the last column
        return out

    def order(self) -> list[int]:
        """The senders that reach a receiver, the largest effect first."""
        by = self.effect.abs().nan_to_num(-1).argsort(descending=True, stable=True).tolist()
        return [i for i in by if self.reaches[i]]

    def table(self, n: int | None = 20) -> Table:
        """The senders whose path moved the metric most, with their share of the difference; every one for `n=None`."""
        parts = [self.values, self.share, *(self.interval() if len(self.group.unique()) > 1 else ())]
        rows = [(self.senders[i], *(float(part[i]) for part in parts)) for i in self.order()[:n]]
        return Table((f"sender to {self._to}", "metric", "share", "95% low", "95% high")[: 1 + len(parts)], rows)

    def held_out(self, k: int = 10, *, seed: int = 0) -> Table:
        """The `k` strongest senders on one half of the groups, with their share, interval and q-value on the other.

        What is chosen and reported on the same pairs looks larger than it is.
        """
        first, second = (self.of_pairs(index) for index in halves(len(self.per_pair), group=self.group, seed=seed))
        chosen, parts = first.order()[:k], (first.share, second.share, *second.interval())
        q = q_values(sign_flip_p(second.moved[:, chosen], group=second.group)).tolist()
        rows = [(self.senders[i], *(float(part[i]) for part in parts), q[n]) for n, i in enumerate(chosen)]
        return Table((f"sender to {self._to}", "where chosen", "share", "95% low", "95% high", "q"), rows)

    def of_pairs(self, index: Int[Tensor, "chosen"]) -> "PathSweep":
        """The same sweep of some pairs only."""
        fields = ("per_pair", "clean_per_pair", "corrupted_per_pair", "group")
        return replace(self, **{name: getattr(self, name)[index] for name in fields})

    def grouped(self, labels: Groups) -> "PathSweep":
        """The same sweep with one label a pair: pairs of one label share something, and intervals resample groups."""
        return replace(self, group=group_numbers(len(self.per_pair), labels))

    def figure(self) -> Any:
        """Layers by heads, MLPs in the last column: the share of the difference that each sender's path carries.

        Bars of the strongest, where senders are asked at several positions each.
        """
        from hooklens.viz.figures import bars, heatmap

        shown, name = (self.share, "share") if self.defined else (self.effect, "change of the metric")
        title = f"sender to {self._to} ({self.semantics})"
        if len(self.place.unique(dim=0)) < len(self.place):
            first = self.order()[:_BARS]
            return bars(shown[first], None, None, [self.senders[i] for i in first], title, y_title=name)
        return heatmap(
            self.grid(shown),
            x=[*(f"H{i}" for i in range(self.shape[1])), "MLP"],
            y=layer_names(self.shape[0]),
            title=f"{title}: {name}",
            x_title="sender",
            y_title="layer",
            colourbar=name,
        )

    @property
    def _gap(self) -> Float[Tensor, "pair"]:
        """The distance from the run that is patched to the other."""
        return self.gap if self.into == "corrupted" else -self.gap

    @property
    def _to(self) -> str:
        more = f" and {len(self.receivers) - 3} more" if len(self.receivers) > 3 else ""
        return ", ".join(self.receivers[:3]) + more


def path_patch(
    model: HookedTransformer,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    receivers: Any = "final",
    senders: Any = None,
    value: Value = "clean",
    resume: str | Path | Resume | None = None,
) -> PathSweep:
    """What does each component send to these receivers? Only the edges from sender to receivers carry its new value.

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
    replacement, held = as_replacement(value), receivers if isinstance(receivers, Fixed) else None
    if not (is_run(replacement, "clean") or is_run(replacement, "corrupted")):
        raise InputError(
            f"a path carries the value of the pair's other run, value='clean' or 'corrupted'; got {replacement.label!r}"
        )
    from_run, into = ("clean", "corrupted") if is_run(replacement, "clean") else ("corrupted", "clean")
    semantics = EDGES
    if held is not None:
        semantics = FIXED if held.mlps == "recomputed" else FIXED_FROZEN
    starts, ends = read_senders(model, senders), read_receivers(model, receivers if held is None else held.receivers)
    pairs = as_pairs(model, clean, corrupted, metric)
    groups = read_aligned(model, pairs.clean, pairs.corrupted)
    check_prompts_differ(groups)
    check_metric(pairs.metric, groups)
    parts = []
    with resuming(resume, "path_patch", n_lengths=len(groups)) as file:
        for group in groups:
            planned = plan_paths(
                model,
                getattr(group, into),
                other=getattr(group, from_run),
                senders=of_pairs(starts, group.index, len(pairs)),
                receivers=of_pairs(ends, group.index, len(pairs)),
                semantics=semantics,
            )
            other = planned.new.streams[model.cfg.n_layers]
            outcome = execute(PathPatches(planned), group.of(pairs.metric), file=file, other=other)
            parts.append(with_other(model, outcome, group, from_run))
    outcome, order = joined(groups, parts), Order(model)
    last = max(order.reads_at(receiver) for receiver in ends)
    places = [(sender.layer, -1 if sender.head is None else sender.head) for sender in starts]
    return PathSweep(
        per_pair=outcome.values.T,
        senders=[sender.name for sender in starts],
        receivers=[receiver.name for receiver in ends],
        semantics=semantics,
        into=into,
        place=torch.tensor(places),
        reaches=torch.tensor([order.feeds_from(sender) <= last for sender in starts]),
        shape=(model.cfg.n_layers, model.cfg.n_heads),
        group=group_numbers(len(pairs), pairs.group),
        **ends_of(outcome, into),
        **outcome.account,
    )


def demo(model: HookedTransformer) -> PathSweep:
    """Who talks to the query and value of the last layer's first head; with one layer, to the logits."""
    last = model.cfg.n_layers - 1
    receivers = [("q", last, 0), ("v", last, 0)] if last else "final"
    return path_patch(model, demo_pairs(model, 2), receivers=receivers)
