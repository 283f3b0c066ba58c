"""What an information-flow study returns: paths, what each carries, and the controls beside which that is read."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.plugins.patching.path_sweep import excludes_zero
from hooklens.result import Result, Table
from hooklens.statistics import null_p, q_values, ratio_interval


@dataclass(frozen=True)
class Choice(Result):
    """`per_receiver` paths are reported for each receiver, each beside `draws` control senders drawn by `seed`.

    `choose_on`: at most so many pairs of the half that chooses, as all senders are swept there; None: all of it.
    """

    per_receiver: int = 4
    draws: int = 49
    choose_on: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("per_receiver", "draws", "choose_on"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is a whole number of at least 1, got {value!r}")


@dataclass(frozen=True, eq=False)
class InformationFlow(Result):
    """Paths chosen on one half of the pairs and measured on the other, beside two kinds of control senders.

    `moved` is what each path moves the metric by. `turned`: what it moves when the same sender writes as much in random
    directions, the null that `p` stands on. `random`: what other senders move, drawn at random from those that reach
    the path's receiver. `whole`: what the path's receiver moves when everything it reads is that of the other run.
    """

    paths: list[str]
    receivers: list[str]  # of each path
    chosen_by: Float[Tensor, "path"]  # share on the half that chose
    moved: Float[Tensor, "pair path"]
    turned: Float[Tensor, "draw pair path"]
    random: Float[Tensor, "draw pair path"]
    whole: Float[Tensor, "pair path"]
    gap: Float[Tensor, "pair"]
    group: Int[Tensor, "pair"]
    halved: bool  # False: one group of pairs, so that paths were chosen and reported on the same
    largest_error: float
    choice: Choice

    @property
    def defined(self) -> bool:
        """Does the interval of clean minus corrupted exclude 0? With one group of pairs: do they differ?"""
        return excludes_zero(self.gap, self.group)

    @property
    def share(self) -> Float[Tensor, "path"]:
        """What each path moves, as a share of the clean-corrupted difference; NaN where that is not `defined`."""
        return self._shares(self.moved.mean(0))

    @property
    def of_receiver(self) -> Float[Tensor, "path"]:
        """What each path moves, as a share of what its receiver moves when everything it reads is exchanged.

        NaN where the receiver as a whole moves nothing beyond chance.
        """
        known = torch.tensor([excludes_zero(one, self.group) for one in self.whole.T])
        return torch.where(known, self.moved.mean(0) / self.whole.mean(0), float("nan"))

    def interval(self, level: float = 0.95) -> tuple[Float[Tensor, "path"], Float[Tensor, "path"]]:
        """Both ends of `share` over groups of pairs; NaN for one group."""
        if len(self.group.unique()) < 2 or not self.defined:
            nothing = torch.full_like(self.share, float("nan"))
            return nothing, nothing.clone()
        return ratio_interval(self.moved, self.gap, group=self.group, level=level)

    @property
    def turned_edge(self) -> Float[Tensor, "path"]:
        """What size of share turned senders stay below in 95 % of draws."""
        return self._shares(self.turned.mean(1)).abs().quantile(0.95, dim=0)

    @property
    def typical(self) -> Float[Tensor, "path"]:
        """The mean size of a random other sender's share, at the same receiver; NaN where there is no other."""
        return self._shares(self.random.mean(1)).abs().mean(0)

    @property
    def p(self) -> Float[Tensor, "path"]:
        """How often a turned sender moves the metric as far as the path itself does."""
        return null_p(self.moved.mean(0).abs(), self.turned.mean(1).abs())

    @property
    def q(self) -> Float[Tensor, "path"]:
        """`p` as false discovery rates over the paths reported."""
        return q_values(self.p)

    def order(self) -> list[int]:
        """The paths, the largest share first."""
        return self.share.abs().nan_to_num(-1).argsort(descending=True, stable=True).tolist()

    def top(self, k: int = 10) -> Table:
        """The `k` paths that carry most."""
        return self.table(k)

    def table(self, n: int | None = 20) -> Table:
        """One row a path: its share with interval, the share of its receiver, controls and q."""
        columns = ("path", "share", "95% low", "95% high", "of receiver", "turned 95%", "random", "q", "where chosen")
        parts = (self.share, *self.interval(), self.of_receiver, self.turned_edge, self.typical, self.q, self.chosen_by)
        return Table(columns, [(self.paths[i], *(float(part[i]) for part in parts)) for i in self.order()[:n]])

    def figure(self) -> Any:
        """Bars of the paths with intervals; diamonds mark what turned senders reach in 95 % of draws."""
        from hooklens.viz.figures import bars

        order, (low, high) = self.order(), self.interval()
        have = bool(low.isfinite().all())
        shown = self.share if self.defined else self.moved.mean(0)
        drawn = bars(
            shown[order],
            low[order] if have else None,
            high[order] if have else None,
            [self.paths[i] for i in order],
            "Which path carries how much",
            y_title="share of the difference" if self.defined else "change of the metric",
        )
        edge = self.turned_edge[order].tolist()
        texts = [f"turned senders: 95 % below {value:.4f}" for value in edge]
        mark = {"symbol": "diamond-open", "size": 9, "color": "black"}
        return drawn.add_scatter(y=edge, mode="markers", marker=mark, text=texts, hoverinfo="text", showlegend=False)

    def _shares(self, effect: Float[Tensor, "*draw path"]) -> Float[Tensor, "*draw path"]:
        return effect / self.gap.mean() if self.defined else torch.full_like(effect, float("nan"))
