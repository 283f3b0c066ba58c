"""Components chosen by their ablation effect on one half of the prompts, and their effect on the other half."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.result import Result, Table
from hooklens.statistics import halves, mean_interval, q_values, sign_flip_p


@dataclass(frozen=True, eq=False)
class HeldOutEffects(Result):
    """Effects of chosen components on prompts that had no say in the choice, a row a kind of ablation.

    `chosen_by` is the effect (of the first kind) that they were chosen by: the largest of many, and so too large. p and
    q values are of the reported half, q over all components and kinds reported.
    """

    kinds: list[str]
    names: list[str]
    chosen_by: Float[Tensor, "component"]
    mean: Float[Tensor, "kind component"]
    low: Float[Tensor, "kind component"]
    high: Float[Tensor, "kind component"]
    p: Float[Tensor, "kind component"]
    q: Float[Tensor, "kind component"]
    chosen_on: Int[Tensor, "prompt"]
    reported_on: Int[Tensor, "other_prompt"]
    n_components: int

    def table(self, n: int | None = None) -> Table:
        """One row a component and kind, components in the order in which they were chosen."""
        columns = ("component", "ablation", "effect", "95% low", "95% high", "p", "q", "where chosen")
        rows = [
            (name, kind, *(float(part[j, i]) for part in (self.mean, self.low, self.high, self.p, self.q)), by)
            for i, (name, by) in enumerate(zip(self.names, self.chosen_by.tolist(), strict=True))
            for j, kind in enumerate(self.kinds)
        ]
        return Table(columns, rows).head(n)

    def top(self, k: int = 10) -> Table:
        """The first `k` components that were chosen."""
        return self.table(k * len(self.kinds))

    def figure(self) -> Any:
        """The effects on the half that did not choose, with intervals."""
        from hooklens.viz.figures import bars

        many = len(self.kinds) > 1
        names = [f"{name} {kind}" if many else name for name in self.names for kind in self.kinds]
        mean, low, high = (part.T.flatten() for part in (self.mean, self.low, self.high))
        title = f"Chosen among {self.n_components} on one half of the prompts, measured on the other"
        return bars(mean, low, high, names, title, y_title="change of the metric")


def held_out(
    effects: Mapping[str, Float[Tensor, "prompt *grid"]],
    names: Sequence[str],
    group: Int[Tensor, "prompt"],
    k: int,
    seed: int,
) -> HeldOutEffects:
    """The `k` cells of largest mean effect of the first kind on half of the groups, and all kinds on the other half."""
    flat = torch.stack([each.flatten(1) for each in effects.values()], 1)  # prompt kind cell
    if not 1 <= k <= len(names):
        raise InputError(f"k lies between 1 and the {len(names)} components, got {k}")
    choose, report = halves(len(flat), group=group.cpu(), seed=seed)
    by = flat[choose, 0].mean(0)
    best = by.abs().argsort(descending=True, stable=True)[:k]
    kept = flat[report][:, :, best]
    of = group[report]
    low, high = mean_interval(kept, group=of)
    p = sign_flip_p(kept, group=of)
    return HeldOutEffects(
        list(effects),
        [names[cell] for cell in best.tolist()],
        by[best],
        kept.mean(0),
        low,
        high,
        p,
        q_values(p),
        choose,
        report,
        len(names),
    )
