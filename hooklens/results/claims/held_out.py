"""The largest of many effects is biased upwards: choose on one half of the prompts, report on the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.results.claims.claim_family import ClaimFamily, family
from hooklens.results.claims.measured import Measured
from hooklens.results.claims.registration import Registration
from hooklens.results.claims.single_claim import claim
from hooklens.results.result import Result, Table
from hooklens.results.statistics import (
    INTERVAL_TERMS,
    Groups,
    Tested,
    few_groups,
    group_numbers,
    halves,
    mean_interval,
    sign_flip_p,
)

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True, eq=False)
class HeldOutEffects(Tested, Result):
    """Effects of chosen components on prompts that were not used to choose them, one row per kind of effect.

    `chosen_per_prompt` is the effect (of the first kind) on the half that chose the components: as the largest of many,
    it is biased upwards. `others` is the mean effect of all components that were not chosen, on the reported half; NaN
    if all were chosen. p and q values refer to the reported half, q over all reported components and kinds.
    """

    ranked_by = "effect where chosen"
    terms = INTERVAL_TERMS | {
        "q": "the false discovery rate over the rows of this table (Benjamini-Hochberg)",
        "where chosen": "the effect on the prompts that chose the component; biased upwards for this reason",
    }

    kinds: list[str]
    names: list[str]
    chosen_per_prompt: Float[Tensor, "prompt component"]
    per_prompt: Float[Tensor, "kind other_prompt component"]
    others: Float[Tensor, "kind other_prompt"]
    chosen_on: Int[Tensor, "prompt"]
    reported_on: Int[Tensor, "other_prompt"]
    group: Int[Tensor, "every_prompt"]
    n_components: int

    @classmethod
    def of(
        cls,
        effects: Mapping[str, Float[Tensor, "prompt *grid"]],
        names: Sequence[str],
        group: Groups,
        k: int,
        seed: int,
    ) -> "HeldOutEffects":
        """Choose the `k` cells with the largest mean effect (first kind) on half of the groups; report the others."""
        flat = torch.stack([effect.detach().flatten(1) for effect in effects.values()])  # kind prompt cell
        n = flat.shape[2]
        if n != len(names):
            raise InputError(f"one name per component is needed, got {len(names)} for {n} components")
        if not 1 <= k <= n:
            raise InputError(f"k must be between 1 and the number of components, {n}, got {k}")
        number = group_numbers(flat.shape[1], group)
        choose, report = halves(len(number), group=number, seed=seed)
        by = flat[0, choose].mean(0)
        best = by.abs().argsort(descending=True, stable=True)[:k]
        rest = torch.ones(n, dtype=torch.bool, device=flat.device)
        rest[best] = False
        reported = flat[:, report]
        return cls(
            kinds=list(effects),
            names=[names[cell] for cell in best.tolist()],
            chosen_per_prompt=flat[0, choose][:, best],
            per_prompt=reported[:, :, best],
            others=reported[:, :, rest].mean(2),
            chosen_on=choose,
            reported_on=report,
            group=number,
            n_components=n,
        )

    @property
    def chosen_by(self) -> Float[Tensor, "component"]:
        """The mean effect by which each was chosen."""
        return self.chosen_per_prompt.mean(0)

    @property
    def mean(self) -> Float[Tensor, "kind component"]:
        """The mean effect on the other half."""
        return self.per_prompt.mean(1)

    @property
    def low(self) -> Float[Tensor, "kind component"]:
        return self._ends[0]

    @property
    def high(self) -> Float[Tensor, "kind component"]:
        return self._ends[1]

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        return mean_interval(self.per_prompt.movedim(1, 0), group=self.group[self.reported_on])

    @cached_property
    def p(self) -> Float[Tensor, "kind component"]:
        """Two-sided p-value of "no effect" on the other half, from sign flips of groups."""
        return sign_flip_p(self.per_prompt.movedim(1, 0), group=self.group[self.reported_on])

    @property
    def shrinkage(self) -> float:
        """The reported effects as a share of those on the choosing half: below 1 if the choice was partly luck."""
        return float(self.mean[0].abs().sum() / self.chosen_by.abs().sum())

    def claims(
        self, model: "HookedTransformer | str", metric: Any = "", *, registered: Sequence[Registration] = ()
    ) -> ClaimFamily:
        """One claim per component and kind, with the mean of the components that were not chosen as its control.

        Valid only for effects of interventions (ablations, patches): an attribution is not an intervention.
        """
        first, second = self.group[self.chosen_on], self.group[self.reported_on]
        claims = []
        for j, kind in enumerate(self.kinds):
            what, which = ("effect", "") if kind == "effect" else (f"effect of {kind} ablation", f" ({kind} ablation)")
            rest = None
            if bool(self.others[j].isfinite().all()):
                rest = Measured.of(f"{what}, mean of the rest", self.others[j], second, metric=metric)
            for i, name in enumerate(self.names):
                seen = Measured.of("effect where chosen", self.chosen_per_prompt[:, i], first, metric=metric)
                effect = Measured.of(what, self.per_prompt[j, :, i], second, metric=metric)
                claims.append(
                    claim(model, f"{name} matters{which}", observation=seen, intervention=effect, control=rest)
                )
        return family(model, claims, registered=registered)

    def rows(self) -> list[tuple[Any, ...]]:
        """Name, effect, both ends of its interval, q, and the effect where chosen; of the first kind of effect."""
        numbers = (self.mean[0], self.low[0], self.high[0], self.q[0], self.chosen_by)
        return [(name, *(float(part[i]) for part in numbers)) for i, name in enumerate(self.names)]

    def how(self, prompts: str = "prompts") -> str:
        """How many prompts chose the components, and how many measured them, as a sentence."""
        chosen, reported = len(self.chosen_on), len(self.reported_on)
        n = len(self.group[self.reported_on].unique())
        groups = f"{n} group" if n == 1 else f"{n} groups"
        return (
            f"Chosen by size on {chosen} {prompts}, measured on {reported} others that share no group with them; "
            f"intervals and q over their {groups}, for which no p is below {2 / 2**n:.2g}{few_groups(n, '; ')}."
        )

    def table(self, n: int | None = None) -> Table:
        """One row per component and kind, in the order in which components were chosen."""
        columns = ("component", "ablation", "effect", "95% low", "95% high", "p", "q", "where chosen")
        parts = (self.mean, self.low, self.high, self.p, self.q)
        rows = [
            (name, kind, *(float(part[j, i]) for part in parts), by)
            for i, (name, by) in enumerate(zip(self.names, self.chosen_by.tolist(), strict=True))
            for j, kind in enumerate(self.kinds)
        ]
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """The effects on the half that did not choose, with intervals."""
        from hooklens.viz.figures import bars

        many = len(self.kinds) > 1
        names = [f"{name} {kind}" if many else name for name in self.names for kind in self.kinds]
        mean, low, high = (part.T.flatten() for part in (self.mean, self.low, self.high))
        title = f"Chosen among {self.n_components} on one half of the prompts, measured on the other"
        return bars(mean, low, high, names, title, y_title="change of the metric")


def held_out_top(
    model: "HookedTransformer",
    per_prompt: Float[Tensor, "prompt *grid"],
    names: Sequence[str],
    *,
    k: int = 10,
    group: Groups = None,
    seed: int = 0,
) -> HeldOutEffects:
    """Which `k` components matter most, and how large is their effect on prompts that did not choose them?

    `per_prompt` contains each prompt's effect of each component, flattened in the order of `names`. Prompts of one
    `group` go to the same half.

    >>> from hooklens.testing import tiny_model
    >>> noise = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    >>> found = held_out_top(tiny_model(), noise, [f"c{i}" for i in range(200)], k=5)
    >>> found.shrinkage < 0.5, bool((found.q < 0.05).any())
    (True, False)

    Reference: Kriegeskorte et al. (2009), "Circular analysis in systems neuroscience".
    """
    return HeldOutEffects.of({"effect": per_prompt}, names, group, k, seed)
