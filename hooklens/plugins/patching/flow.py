"""What an information-flow study returns: paths, what each carries, and the controls beside which that is read."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.plugins.patching.two_runs import excludes_zero, share_ends, share_of
from hooklens.results.account import RunAccount
from hooklens.results.result import Result, Table
from hooklens.results.statistics import Ends, Groups, Tested


@dataclass(frozen=True)
class Choice(Result):
    """`per_receiver` paths are reported for each receiver, each beside `draws` turned senders drawn by `seed`.

    `choose_on`: at most so many pairs of the half that chooses, as all senders are swept there; None: all of it.
    `group`: one label a pair, of which halves and intervals keep pairs of the same label together.
    """

    per_receiver: int = 4
    draws: int = 99
    choose_on: int | None = None
    seed: int = 0
    group: Groups = None

    def __post_init__(self) -> None:
        for name in ("per_receiver", "draws", "choose_on"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value, 1)


@dataclass(frozen=True, eq=False)
class InformationFlow(RunAccount, Tested, Result):
    """Paths chosen on one half of the pairs and measured on the other, beside two kinds of control senders.

    `moved` is what each path moves the metric by. `turned`: what it moves when the same sender writes as much in random
    directions. `others`: what each other sender that reaches the path's receiver moves, mean over pairs (NaN where a
    receiver has fewer than the most). A path has to stand out of both: see `p`. `total`: what the path's receiver moves
    when everything it reads is that of the other run.
    """

    ranked_by = "what the path carries"

    terms = {
        "turned 95%": "the control: which share the same sender stays below in 95 % of draws when it writes in random "
        "directions",
        "others": "the other control: the typical share of the other senders that reach this receiver",
    }

    paths: list[str]
    receivers: list[str]  # of each path
    chosen_by: Float[Tensor, "path"]  # share on the half that chose
    moved: Float[Tensor, "pair path"]
    turned: Float[Tensor, "draw pair path"]
    others: Float[Tensor, "other path"]
    total: Float[Tensor, "pair path"]
    gap: Float[Tensor, "pair"]
    group: Int[Tensor, "pair"]
    halved: bool  # False: one group of pairs, so that paths were chosen and reported on the same
    choice: Choice

    @property
    def defined(self) -> bool:
        """Does the interval of clean minus corrupted exclude 0? With one group of pairs: do they differ?"""
        return excludes_zero(self.gap, self.group)

    @property
    def effect(self) -> Float[Tensor, "path"]:
        """What each path moves, mean over pairs."""
        return self.moved.mean(0)

    @property
    def share(self) -> Float[Tensor, "path"]:
        """What each path moves, as a share of the clean-corrupted difference; NaN where that is not `defined`."""
        return self._shares(self.effect)

    @property
    def of_receiver(self) -> Float[Tensor, "path"]:
        """What each path moves, as a share of what its receiver moves when everything it reads is exchanged.

        NaN where the receiver as a whole moves nothing beyond chance.
        """
        known = torch.tensor(
            [excludes_zero(per_pair, self.group) for per_pair in self.total.T], device=self.total.device
        )
        return torch.where(known, self.effect / self.total.mean(0), float("nan"))

    def interval(self, level: float = 0.95) -> Ends:
        """Both ends of `share` over groups of pairs; NaN for one group."""
        return share_ends(self.moved, self.gap, group=self.group, level=level)

    @property
    def turned_edge(self) -> Float[Tensor, "path"]:
        """What size of share turned senders stay below in 95 % of draws."""
        return self._shares(self.turned.mean(1)).abs().quantile(0.95, dim=0)

    @property
    def typical(self) -> Float[Tensor, "path"]:
        """The mean size of the other senders' shares, at the same receiver; NaN where there is no other."""
        return self._shares(self.others).abs().nanmean(0)

    @property
    def p_turned(self) -> Float[Tensor, "path"]:
        """How often a turned sender moves the metric as far as the path itself: does the direction matter?

        The turned senders of all paths are one null, each over the root mean square of its own path's other draws, so
        that p can survive the number of paths. That takes turned effects of all paths to be spread alike, but for size.
        """
        effect, turned = self.effect.abs(), self.turned.mean(1).abs()
        squares, draws = turned.square(), len(turned)
        rest = ((squares.sum(0) - squares).clamp_min(0) / max(1, draws - 1)).sqrt()
        null, own = _times(turned, rest).flatten(), _times(effect, squares.mean(0).sqrt())
        return ((null[:, None] >= own).sum(0) + 1).double() / (len(null) + 1)

    @property
    def p_others(self) -> Float[Tensor, "path"]:
        """Where the path ranks among all other senders, each over the mean size of those at its own receiver.

        A rank, which says that the path stands out; NaN where there is no other sender.
        """
        every = torch.cat((self.effect[None], self.others)).abs()
        there = every[:, self._pooled]
        n = there.isfinite().sum(0)
        rest = (there.nansum(0) - there) / (n - 1)  # the mean of the others at the same receiver
        pool = _times(there, rest)[there.isfinite()]
        own = _times(every[0], every[1:].nanmean(0))
        reached = (pool[:, None] >= own * (1 - 1e-6)).sum(0).clamp_min(1)  # the path itself is one of them
        return torch.where(self.others.isfinite().any(0), reached.double() / len(pool), torch.nan)

    @property
    def p(self) -> Float[Tensor, "path"]:
        """The larger of `p_turned` and `p_others`; the first alone where there is no other sender."""
        return torch.fmax(self.p_turned, self.p_others)

    @property
    def least_q(self) -> float:
        """The smallest q that a path which alone matters could get, with so many draws and other senders."""
        n = int(self.others[:, self._pooled].isfinite().sum()) + len(self._pooled)
        least = max(1 / (len(self.turned) * len(self.paths) + 1), 1 / n if n else 0.0)
        return min(1.0, len(self.paths) * least)

    @property
    def _pooled(self) -> list[int]:
        """One path of each receiver that has other senders."""
        have = self.others.isfinite().any(0).tolist()
        return [i for name in dict.fromkeys(self.receivers) if have[i := self.receivers.index(name)]]

    def order(self) -> list[int]:
        """The paths, the largest share first."""
        return self.share.abs().nan_to_num(-1).argsort(descending=True, stable=True).tolist()

    def table(self, n: int | None = 20) -> Table:
        """One row a path: its share with interval, the share of its receiver, controls and q."""
        columns = ("path", "share", "95% low", "95% high", "of receiver", "turned 95%", "others", "q", "where chosen")
        parts = (self.share, *self.interval(), self.of_receiver, self.turned_edge, self.typical, self.q, self.chosen_by)
        return Table(columns, [(self.paths[i], *(float(part[i]) for part in parts)) for i in self.order()[:n]])

    def figure(self) -> Any:
        """Bars of the paths with intervals; diamonds mark what turned senders reach in 95 % of draws."""
        from hooklens.viz.figures import bars

        order, (low, high) = self.order(), self.interval()
        finite = bool(low.isfinite().all())
        ends: dict[str, Any] = {"low": low[order], "high": high[order]} if finite else {}
        shown, name = (self.share, "share of the difference") if self.defined else (self.effect, "change of the metric")
        names, title = [self.paths[i] for i in order], "Which path carries how much"
        drawn = bars(shown[order], labels=names, title=title, y_title=name, **ends)
        edge = self.turned_edge[order].tolist()
        texts = [f"turned senders: 95 % below {value:.4f}" for value in edge]
        mark = {"symbol": "diamond-open", "size": 9, "color": "black"}
        drawn.update_layout(height=360 + 7 * max(map(len, self.paths)))  # names stand upright below the bars
        return drawn.add_scatter(y=edge, mode="markers", marker=mark, text=texts, hoverinfo="text", showlegend=False)

    def _shares(self, effect: Float[Tensor, "*draw path"]) -> Float[Tensor, "*draw path"]:
        return share_of(effect, self.gap, self.group)


def _times(values: Float[Tensor, "*other path"], mean: Float[Tensor, "*other path"]) -> Float[Tensor, "*other path"]:
    """How many times the mean; 0 of nothing is 0."""
    return torch.where(values > 0, values / mean, 0.0)
