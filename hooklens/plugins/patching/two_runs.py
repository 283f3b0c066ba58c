"""The two runs that a patched one is read between."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.prompts import Pairs
from hooklens.plugins.patching.grid import in_order
from hooklens.sweeps.execution import Outcome
from hooklens.sweeps.naive import first_nonfinite, not_finite
from hooklens.sweeps.resume import Resume

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


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


def resume_of(asked: str | Path | Resume | None, groups: Sequence[Pairs]) -> Resume | None:
    """The file of a sweep, if one was asked for: it keeps pairs of one length."""
    if asked is not None and len(groups) > 1:
        raise InputError("resume= needs prompts of one length; patch each length on its own")
    return None if asked is None else Resume.of(asked)


def with_other(model: "HookedTransformer", outcome: Outcome, group: Pairs, name: str) -> Outcome:
    """The sweep, once the metric of the other run ("clean" or "corrupted") is known to be finite."""
    found, tokens = outcome.other, group.clean if name == "clean" else group.corrupted
    assert found is not None
    if (said := not_finite(found)) is not None:
        point = first_nonfinite(model, tokens)
        where = "every activation is finite: look at the metric" if point is None else f"not finite from {point} on"
        raise InputError(f"the metric of the {name} run is {said}: {where}")
    if group.aligned:  # the same prompt twice is the same number, not one to rounding
        found = torch.where((group.clean == group.corrupted).all(1), outcome.base, found)
    return replace(outcome, other=found)


def joined(groups: Sequence[Pairs], parts: Sequence[Outcome]) -> Outcome:
    """The sweeps of the pairs of each length as one, the pairs in the order in which they were given."""
    sizes = [len(group.index) for group in groups]
    return Outcome(
        values=in_order(groups, [part.values.T for part in parts]).T,
        base=in_order(groups, [part.base for part in parts]),
        computed=sum(part.computed * n for part, n in zip(parts, sizes, strict=True)) / sum(sizes),
        largest_error=float(torch.tensor([part.largest_error for part in parts]).max()),
        n_verified=sum(part.n_verified for part in parts),
        how=parts[0].how,
        kernel=parts[0].kernel,
        other=in_order(groups, [part.other for part in parts if part.other is not None]),
    )


def ends_of(outcome: Outcome, into: str) -> tuple[Float[Tensor, "pair"], Float[Tensor, "pair"]]:
    """The metric of the clean and of the corrupted run, of which one was patched."""
    assert outcome.other is not None
    return (outcome.other, outcome.base) if into == "corrupted" else (outcome.base, outcome.other)
