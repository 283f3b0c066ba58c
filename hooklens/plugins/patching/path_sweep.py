"""The result of a path-patching sweep: one number a sender and pair, and what is needed to read it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.component import layer_names
from hooklens.plugins.patching.two_runs import TwoRuns
from hooklens.results.result import Result, Table
from hooklens.results.statistics import (
    DRAWS,
    Groups,
    group_numbers,
    halves,
    mean_interval,
    q_values,
    ratio_interval,
    sign_flip_p,
)

_BARS = 40
Ends = tuple[Float[Tensor, "sender"], Float[Tensor, "sender"]]


@dataclass(frozen=True, eq=False)
class PathSweep(TwoRuns, Result):
    """The metric after each sender was patched into the receivers, beside that of the two runs it lies between.

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
    computed: float
    largest_error: float
    n_verified: int
    how: str
    kernel: str = ""

    @property
    def values(self) -> Float[Tensor, "sender"]:
        """The metric after each patch, mean over pairs."""
        return self.per_pair.mean(0)

    @property
    def moved(self) -> Float[Tensor, "pair sender"]:
        """How far each patch moved the metric of each pair, from the run that was patched."""
        return self.per_pair - self._ends[0][:, None]

    @property
    def effect(self) -> Float[Tensor, "sender"]:
        """How far each patch moved the metric, mean over pairs."""
        return self.moved.mean(0)

    @property
    def share(self) -> Float[Tensor, "sender"]:
        """`effect` over the distance to the run that the new values come from: 0 nothing, 1 all of it.

        Clean into corrupted this is what is recovered. NaN where the two runs do not differ by more than chance.
        """
        base, other = self._ends
        return self.effect / (other - base).mean() if self.defined else torch.full_like(self.effect, float("nan"))

    @property
    def recovered(self) -> Float[Tensor, "sender"]:
        """(value - corrupted) / (clean - corrupted), as `hl.patch` has it: 0 as corrupted, 1 as clean."""
        return self.share if self.into == "corrupted" else 1 - self.share

    @property
    def defined(self) -> bool:
        """Does the interval of clean minus corrupted exclude 0? With one group of pairs: do they differ?"""
        return excludes_zero(self.clean_per_pair - self.corrupted_per_pair, self.group)

    @property
    def many(self) -> bool:
        """Are there at least two independent groups, so that an interval means something?"""
        return len(self.group.unique()) > 1

    def interval(self, level: float = 0.95, *, draws: int = DRAWS, seed: int = 0) -> Ends:
        """Both ends of `share`, by a bootstrap over groups that recomputes both means; NaN for one group."""
        if not self.defined:
            nothing = torch.full_like(self.effect, float("nan"))
            return nothing, nothing.clone()
        base, other = self._ends
        return ratio_interval(self.moved, other - base, group=self.group, level=level, draws=draws, seed=seed)

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
        share, (low, high), many = self.share, self.interval(), self.many
        rows: list[tuple] = []
        for i in self.order()[:n]:
            row = (self.senders[i], float(self.values[i]), float(share[i]))
            rows.append((*row, float(low[i]), float(high[i])) if many else row)
        columns = (f"sender to {self._to}", "metric", "share", "95% low", "95% high")
        return Table(columns if many else columns[:3], rows)

    def held_out(self, k: int = 10, *, seed: int = 0) -> Table:
        """The `k` strongest senders on one half of the groups, with their share, interval and q-value on the other.

        What is chosen and reported on the same pairs looks larger than it is.
        """
        first, second = (self.of_pairs(index) for index in halves(len(self.per_pair), group=self.group, seed=seed))
        chosen, share, (low, high) = first.order()[:k], second.share, second.interval()
        q = q_values(sign_flip_p(second.moved[:, chosen], group=second.group))
        rows = [
            (self.senders[i], float(first.share[i]), float(share[i]), float(low[i]), float(high[i]), float(q[n]))
            for n, i in enumerate(chosen)
        ]
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
        if len(self.place.unique(dim=0)) < len(self.place):
            first, title = self.order()[:_BARS], f"sender to {self._to} ({self.semantics})"
            return bars(shown[first], None, None, [self.senders[i] for i in first], title, y_title=name)
        return heatmap(
            self.grid(shown),
            x=[*(f"H{i}" for i in range(self.shape[1])), "MLP"],
            y=layer_names(self.shape[0]),
            title=f"sender to {self._to} ({self.semantics}): {name}",
            x_title="sender",
            y_title="layer",
            colourbar=name,
        )

    @property
    def _ends(self) -> tuple[Float[Tensor, "pair"], Float[Tensor, "pair"]]:
        """The metric of the run that is patched, and of the other."""
        ends = self.corrupted_per_pair, self.clean_per_pair
        return ends if self.into == "corrupted" else ends[::-1]

    @property
    def _to(self) -> str:
        more = f" and {len(self.receivers) - 3} more" if len(self.receivers) > 3 else ""
        return ", ".join(self.receivers[:3]) + more


def excludes_zero(gap: Float[Tensor, "pair"], group: Int[Tensor, "pair"]) -> bool:
    """Does the interval of the mean over groups exclude 0? With one group: is the mean another number?

    >>> excludes_zero(torch.tensor([1.0, 2.0, 1.5]), torch.tensor([0, 1, 2]))
    True
    """
    if len(group.unique()) < 2:
        return bool(gap.mean() != 0)
    low, high = mean_interval(gap, group=group)
    return not bool(low <= 0 <= high)
