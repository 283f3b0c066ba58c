"""The clean and the corrupted run beside a sweep, and the sweeps of pairs of several lengths joined into one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.prompts import Pairs, same_inputs
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.grid import in_order
from hooklens.results.account import RunAccount
from hooklens.results.statistics import DRAWS, Ends, Groups, mean_interval, ratio_interval
from hooklens.sweeps.execution import Outcome
from hooklens.sweeps.naive import first_nonfinite, not_finite


class TwoRuns:
    """What results of patching share: the metric of the clean and of the corrupted run, pair by pair and on average."""

    baselines: ClassVar[tuple[str, ...]] = ("clean", "corrupted")
    clean_per_pair: Float[Tensor, "pair"]
    corrupted_per_pair: Float[Tensor, "pair"]

    @property
    def clean(self) -> float:
        """The metric of the clean run, mean over pairs."""
        return float(self.clean_per_pair.mean())

    @property
    def corrupted(self) -> float:
        """The metric of the corrupted run, mean over pairs."""
        return float(self.corrupted_per_pair.mean())

    @property
    def gap(self) -> Float[Tensor, "pair"]:
        """The difference between the two runs, clean minus corrupted."""
        return self.clean_per_pair - self.corrupted_per_pair

    @property
    def defined(self) -> bool:
        """Does the interval of clean minus corrupted exclude 0? With one group of pairs: do they differ?"""
        return excludes_zero(self.gap, getattr(self, "group", None))


class Swept(TwoRuns):
    """What sweeps between two runs share, of which `into` says which was patched."""

    into: str
    per_pair: Float[Tensor, "pair *cell"]

    @property
    def values(self) -> Float[Tensor, "*cell"]:
        """The metric after each patch, mean over pairs."""
        return self.per_pair.mean(0)

    @property
    def moved(self) -> Float[Tensor, "pair *cell"]:
        """How far each patch moved the metric of each pair, from the run that was patched."""
        return self._from(self.corrupted_per_pair if self.into == "corrupted" else self.clean_per_pair)

    @property
    def effect(self) -> Float[Tensor, "*cell"]:
        """How far each patch moved the metric, mean over pairs."""
        return self.moved.mean(0)

    @property
    def recovered(self) -> Float[Tensor, "*cell"]:
        """(value - corrupted) / (clean - corrupted), each a mean over pairs: 0 as corrupted, 1 as clean.

        NaN everywhere where clean and corrupted do not differ, or differ by no more than chance over pairs.
        """
        return share_of(self._from(self.corrupted_per_pair).mean(0), self.gap, getattr(self, "group", None))

    def _from(self, run: Float[Tensor, "pair"]) -> Float[Tensor, "pair *cell"]:
        return self.per_pair - run.view(-1, *[1] * (self.per_pair.ndim - 1))


def excludes_zero(gap: Float[Tensor, "pair"], group: Groups) -> bool:
    """Does the interval of the mean over groups exclude 0? With one group: is the mean another number?

    >>> excludes_zero(torch.tensor([1.0, 2.0, 1.5]), torch.tensor([0, 1, 2]))
    True
    """
    if len(gap if group is None else group.unique()) < 2:
        return bool(gap.mean() != 0)
    low, high = mean_interval(gap, group=group)
    return not bool(low <= 0 <= high)


def share_of(effect: Float[Tensor, "*cell"], gap: Float[Tensor, "pair"], group: Groups) -> Float[Tensor, "*cell"]:
    """Effects as shares of the mean gap between two runs; NaN where the gap could be chance."""
    return effect / gap.mean() if excludes_zero(gap, group) else torch.full_like(effect, float("nan"))


def share_ends(
    moved: Float[Tensor, "pair *cell"],
    gap: Float[Tensor, "pair"],
    *,
    group: Groups,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Ends:
    """Both ends of a share, by a bootstrap over groups that recomputes both means; NaN for one group."""
    if not excludes_zero(gap, group):
        return torch.full_like(moved[0], float("nan")), torch.full_like(moved[0], float("nan"))
    return ratio_interval(moved, gap, group=group, level=level, draws=draws, seed=seed)


def with_other(model: HookedTransformer, outcome: Outcome, group: Pairs, name: str) -> Outcome:
    """The sweep, once the metric of the other run ("clean" or "corrupted") is known to be finite."""
    other, tokens = outcome.other, group.clean if name == "clean" else group.corrupted
    assert other is not None
    if (fault := not_finite(other)) is not None:
        point = first_nonfinite(model, tokens)
        where = "every activation is finite: look at the metric" if point is None else f"not finite from {point} on"
        raise InputError(f"the metric of the {name} run is {fault}: {where}")
    if group.aligned:  # the same prompt twice is the same number, not one to rounding
        other = torch.where(same_inputs(group.clean, group.corrupted).all(1), outcome.base, other)
    return replace(outcome, other=other)


def joined(groups: Sequence[Pairs], parts: Sequence[Outcome]) -> Outcome:
    """The sweeps of the pairs of each length as one, the pairs in the order in which they were given."""
    others = [part.other for part in parts if part.other is not None]
    return replace(
        parts[0],
        values=in_order(groups, [part.values.T for part in parts]).T,
        base=in_order(groups, [part.base for part in parts]),
        other=in_order(groups, others) if others else None,
        **RunAccount.joined(parts, [len(group.index) for group in groups]).account,
    )


def ends_of(outcome: Outcome, into: str) -> dict[str, Any]:
    """The metric of the clean and of the corrupted run, of which one was patched, as fields of a result."""
    assert outcome.other is not None
    ends = (outcome.other, outcome.base) if into == "corrupted" else (outcome.base, outcome.other)
    return dict(zip(("clean_per_pair", "corrupted_per_pair"), ends, strict=True))
