"""The measurements of every head that may move a name, and the resulting verdict."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.component import head_name, head_names
from hooklens.plugins.heads.head_ranking import Head, PerHead, head_table, ranked
from hooklens.results.result import Result, Table
from hooklens.results.statistics import halves, ratio_interval

Ends = tuple[PerHead, PerHead]
_NAMED = 10  # heads whose name is written into the figure


@dataclass(frozen=True)
class Criteria(Result):
    """The criteria for a name mover; `level` is that of every interval.

    attention: the last position's attention to the indirect object, minus that to any other position except the first
    (to which idle heads attend), exceeds `least_margin`. copying: for at least a share `least_copying` of the names,
    the head's OV puts the name itself among the `top_k` tokens. direct: the share of the clean-corrupted difference
    that the head restores on its direct path to the logits exceeds `least_direct`.
    """

    least_margin: float = 0.1
    top_k: int = 5
    least_copying: float = 0.5
    least_direct: float = 0.01
    level: float = 0.95

    def __post_init__(self) -> None:
        whole("top_k", self.top_k, 1)


@dataclass(frozen=True, eq=False)
class NameMovers(Result):
    """The three measurements of every head, pair by pair, and the criteria that they are compared with.

    `attention` is the last position's attention to the indirect object, and `margin` how much it exceeds that to any
    other position except the first. `rank` is a name's rank among all tokens after the name, as block 0 outputs it, is
    passed through the head's values and output, the final norm's weight and W_U (0: first; last ranks: the head writes
    the opposite of the name). `written` is what that adds to the logits of all the prompts' names: the excess of its
    diagonal over the other names is copying, as opposed to raising all names. `direct` is the change of the logit
    difference when the head's output in the corrupted run is replaced by the clean one for the final norm and the
    unembedding only. `group` says which pairs share names and sentence: intervals resample groups, because pairs within
    a group are not independent.
    """

    ranked_by = "direct effect"

    attention: Float[Tensor, "pair layer head"]
    margin: Float[Tensor, "pair layer head"]
    rank: Int[Tensor, "name layer head"]
    written: Float[Tensor, "name layer head other"]
    direct: Float[Tensor, "pair layer head"]
    placebo: Float[Tensor, "pair layer head"]
    gap: Float[Tensor, "pair"]
    name: Int[Tensor, "pair"]
    group: Int[Tensor, "pair"]
    d_vocab: int
    criteria: Criteria

    @property
    def copying(self) -> PerHead:
        """The share of names that the head's OV puts among its `top_k` tokens."""
        return (self.rank < self.criteria.top_k).float().mean(0)

    @property
    def suppressing(self) -> PerHead:
        """The share of names that the head's OV puts among its `top_k` least likely tokens."""
        return (self.rank >= self.d_vocab - self.criteria.top_k).float().mean(0)

    @property
    def share(self) -> PerHead:
        """The share of the clean-corrupted difference that each head restores on its direct path."""
        return self.direct.mean(0) / self.gap.mean()

    def share_interval(self) -> Ends:
        """The interval of `share`, over groups of pairs."""
        return self._interval(self.direct, self.gap)

    def margin_interval(self) -> Ends:
        """The interval of the mean `margin`, over groups of pairs."""
        return self._interval(self.margin, torch.ones_like(self.gap))

    @property
    def defined(self) -> bool:
        """Does the model do the task: does the interval of the clean-corrupted difference lie above 0?"""
        low, _ = self._interval(self.gap[:, None, None], torch.ones_like(self.gap))
        return bool(low[0, 0] > 0)

    @property
    def passes(self) -> Bool[Tensor, "test layer head"]:
        """Which heads attend, copy, and act directly, in this order."""
        criteria = self.criteria
        attends = self.margin_interval()[0] > criteria.least_margin
        acts = self.share_interval()[0] > criteria.least_direct
        return torch.stack([attends, self.copying >= criteria.least_copying, acts & self.defined])

    def verdict(self) -> list[list[str]]:
        """The verdict on each head: "name mover" if all three hold, else a description of its direct effect.

        Numbers from the same pairs are biased upwards for these heads: report those of other pairs, as `table` does.
        """
        low, high = self.share_interval()
        least, defined = self.criteria.least_direct, self.defined
        otherwise = "little direct effect" if len(self.group.unique()) > 1 else "no interval"
        verdict = [[otherwise] * self.share.shape[1] for _ in range(self.share.shape[0])]
        # in this order, as a name mover also restores the difference
        for words, holds in (
            ("lowers the logit difference", (high < -least) & defined),
            ("restores the logit difference", (low > least) & defined),
            ("name mover", self.passes.all(0)),
        ):
            for layer, head in holds.nonzero().tolist():
                verdict[layer][head] = words
        return verdict

    def halves(self, *, seed: int = 0) -> tuple[Int[Tensor, "chosen"], Int[Tensor, "reported"]]:
        """The pairs that label heads, and the others, that report numbers; if there is one group, all pairs twice."""
        n = len(self.group)
        if len(self.group.unique()) < 2:
            return torch.arange(n), torch.arange(n)
        return halves(n, group=self.group, seed=seed)

    @property
    def name_movers(self) -> list[Head]:
        """(layer, head) of every head that passes all three, the largest direct effect first."""
        passes = self.passes.all(0)
        return [head for head in ranked(self.share) if passes[head]]

    def order(self) -> list[Head]:
        """Every (layer, head), the largest direct effect first, regardless of sign."""
        return ranked(self.share.abs())

    def table(self, n: int | None = 12) -> Table:
        """One row per head: labelled and ranked by one half of the pairs, measured on the other."""
        named, reported = (of_pairs(self, half) for half in self.halves())
        low, high = reported.share_interval()
        columns: dict[str, Any] = {"called": [words for layer in named.verdict() for words in layer]}
        columns |= {"direct effect": reported.share, "low": low, "high": high}
        columns |= {"attends to IO": reported.attention.mean(0), "margin": reported.margin.mean(0)}
        columns |= {"copies": reported.copying, "suppresses": reported.suppressing}
        return head_table(named.share.abs(), columns, n)

    def figure(self) -> Any:
        """Every head by its attention to the indirect object and its direct effect, coloured by copying."""
        from hooklens.viz.curves import scatter

        attention, share = self.attention.mean(0), self.share
        drawn = scatter(
            attention.flatten(),
            share.flatten(),
            head_names(*share.shape),
            "Heads: attention to the indirect object, and effect on the logits",
            x_title="attention of the last position to the indirect object",
            y_title="direct effect (share of the difference)",
            colour=self.copying.flatten(),
            colourbar="copies names",
        )
        for at in self.order()[:_NAMED]:
            x, y = float(attention[at]), float(share[at])
            drawn.add_annotation(x=x, y=y, text=head_name(*at), showarrow=False, yshift=12, font_size=11)
        return drawn

    def _interval(self, values: Float[Tensor, "pair layer head"], below: Float[Tensor, "pair"]) -> Ends:
        top, bottom = by_group(values, self.group), by_group(below, self.group)
        low, high = ratio_interval(top.flatten(1), bottom, level=self.criteria.level)
        return low.view(values.shape[1:]), high.view(values.shape[1:])


def of_pairs(movers: NameMovers, index: Int[Tensor, "some"]) -> NameMovers:
    """The same measurements for some of the pairs and their names."""
    per_pair = ("attention", "margin", "direct", "placebo", "gap", "group")
    index = index.to(movers.gap.device)
    names, name = movers.name[index].unique(return_inverse=True)
    some = {field: getattr(movers, field)[index] for field in per_pair}
    return replace(movers, **some, name=name, rank=movers.rank[names], written=movers.written[names][..., names])


def by_group(values: Float[Tensor, "pair *cell"], group: Int[Tensor, "pair"]) -> Float[Tensor, "group *cell"]:
    """The mean over each group's pairs.

    >>> by_group(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])).tolist()
    [2.0, 5.0]
    """
    return torch.stack([values[group == number].mean(0) for number in group.unique()])
