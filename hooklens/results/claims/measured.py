"""A measurement for a claim: one number per prompt, its meaning, and its metric."""

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.results.result import Result
from hooklens.results.statistics import few_groups, group_numbers, mean_interval, sign_flip_p, studentised_interval

LEVEL = 0.95
SKEWED_LEVEL = 0.98  # at 0.95, 7 to 11 % of lognormal effects of mean 0 in 6 to 20 groups exclude 0; at 0.98, 5 to 6 %
_FLIPS = 10_000


@dataclass(frozen=True, eq=False)
class Measured(Result):
    """One number per prompt, the groups of the prompts, a description of the measurement, and its metric."""

    what: str
    per_prompt: Float[Tensor, "prompt"]
    group: Int[Tensor, "prompt"]
    metric: str = ""

    @classmethod
    def of(cls, what: str, per_prompt: Any, group: Any = None, *, metric: Any = "") -> "Measured":
        """Make a measurement from numbers or a tensor. Prompts of one group are related; by default each is its own.

        Pass the `metric` itself if there is one: its name is compared with that in a registration.

        >>> Measured.of("attention to the name", [0.5, 1.0]).mean
        0.75
        """
        values = torch.as_tensor(per_prompt).detach().cpu()
        values = values if values.is_floating_point() else values.double()
        if values.ndim != 1 or not len(values):
            raise InputError(f"{what!r} needs one number per prompt, got shape {list(values.shape)}")
        if not bool(values.isfinite().all()):
            raise InputError(f"{what!r} is not finite for {int((~values.isfinite()).sum())} of {len(values)} prompts")
        number = group_numbers(len(values), None if group is None else torch.as_tensor(group))
        return cls(what, values, number, metric_name(metric))

    @classmethod
    def edge_of(cls, what: str, draws: Any, group: Any = None, *, metric: Any = "") -> "Measured":
        """Of many draws of a control `[draw prompt]`, the one at the 97.5 % quantile of the means, on the larger side.

        Each side has such a draw; the one further from 0 is used. An effect must exceed it to be larger than what the
        draws show by chance; with fewer than 39 draws it is the largest.

        >>> Measured.edge_of("random directions", [[float(i)] * 2 for i in range(-70, 30)]).mean
        -69.0
        """
        values = torch.as_tensor(draws).detach().cpu()
        if values.ndim != 2 or not len(values):
            raise InputError(f"draws need one row per draw and one number per prompt, got shape {list(values.shape)}")
        means = values.double().mean(1)
        order = means.argsort(stable=True)
        at = min(len(values), math.ceil((1 + LEVEL) / 2 * (len(values) + 1))) - 1
        edge = max(order[at], order[len(values) - 1 - at], key=lambda draw: abs(float(means[draw])))
        return cls.of(f"{what}, 97.5 % edge of {len(values)}", values[edge], group, metric=metric)

    @property
    def mean(self) -> float:
        return float(self.per_prompt.double().mean())

    @property
    def n_groups(self) -> int:
        """The number of independent units."""
        return int(self.group.max()) + 1

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean over groups; NaN for a single group."""
        return self._ends[0]

    def studentised(self) -> tuple[float, float]:
        """The 98 % interval that accounts for the skew of the values; a claim requires it in addition to `interval`."""
        return self._ends[1]

    @functools.cached_property
    def _ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        values, group = self.per_prompt.double(), self.group
        low, high = mean_interval(values, group=group, level=LEVEL)
        skewed_low, skewed_high = studentised_interval(values, group=group, level=SKEWED_LEVEL)
        return (float(low), float(high)), (float(skewed_low), float(skewed_high))

    def p(self, null: float = 0.0) -> float:
        """Two-sided p-value of "the mean is `null`", from sign flips of groups."""
        return float(sign_flip_p(self.per_prompt.double() - null, group=self.group, draws=_FLIPS))

    def beyond(self, control: "Measured", *, mirrored: bool = False) -> "Measured":
        """This minus the control, prompt by prompt; `mirrored`: minus the control with its sign reversed."""
        if len(self.per_prompt) != len(control.per_prompt) or not torch.equal(self.group, control.group):
            raise InputError(
                f"{self.what!r} and its control {control.what!r} must be measured on the same prompts in the same "
                f"groups, got {len(self.per_prompt)} in {self.n_groups} and {len(control.per_prompt)} in "
                f"{control.n_groups}"
            )
        if self.metric and control.metric and self.metric != control.metric:
            raise InputError(
                f"{self.what!r} is measured by {self.metric!r} and its control by {control.metric!r}; use one metric"
            )
        turn, word = (-1.0, "plus") if mirrored else (1.0, "minus")
        moved = self.per_prompt.double() - turn * control.per_prompt.double()
        return Measured(f"{self.what}, {word} {control.what}", moved, self.group, self.metric)

    def said(self) -> str:
        """The mean with its interval, in words."""
        low, high = self.interval()
        a, b = self.studentised()
        ends = "no interval" if low != low else f"95 % [{low:.3g}, {high:.3g}]"
        ends += "" if a != a else f", studentised 98 % [{a:.3g}, {b:.3g}]"
        counted = f"{len(self.per_prompt)} prompts in {self.n_groups} groups{few_groups(self.n_groups, '; ')}"
        return f"{self.what} {self.mean:.3g} ({ends}, {counted})"


def metric_name(metric: Any) -> str:
    """The name of a metric: that of its function, or of the built-in that made it; a string stays as it is.

    >>> from hooklens.metrics import LogitDiff
    >>> one = torch.tensor([0])
    >>> metric_name(LogitDiff(one, one, one)), metric_name("fall of accuracy")
    ('logit_diff', 'fall of accuracy')
    """
    if isinstance(metric, str):
        return metric
    while isinstance(metric, functools.partial):
        metric = metric.func
    kind = metric if isinstance(metric, type) else type(metric)
    name = None if kind is metric else getattr(metric, "__name__", None)
    if name == "<lambda>":
        raise InputError("a lambda has no name for a registration; give a named function, or the metric's name")
    return name or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
