"""Schedules of the learning rate: which factor of the optimiser's rate does each step use?"""

import math
from dataclasses import dataclass
from typing import ClassVar

from hooklens.core.errors import InputError
from hooklens.model.config import Part


@dataclass(frozen=True)
class Schedule(Part):
    """A factor of the learning rate for every step; the first `warmup` steps rise linearly to the full rate."""

    slot = "schedule"
    #: Whether the rate in a step depends on how many steps are planned; if not, a run may be extended.
    depends_on_steps: ClassVar[bool] = True
    warmup: int = 0

    def factor(self, step: int, steps: int) -> float:
        """The factor in step `step` (0, 1, ...) of `steps`.

        >>> [Cosine(warmup=2).factor(step, 6) for step in (0, 1, 2, 4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after_warmup(step - self.warmup, max(1, steps - self.warmup))

    def after_warmup(self, step: int, steps: int) -> float:
        """The factor once the warm-up is over, which `step` counts from."""
        raise InputError(f"{type(self).__name__} does not say what follows the warm-up; define after_warmup()")


@dataclass(frozen=True)
class Constant(Schedule):
    """The full rate after the warm-up. Only this schedule does not depend on how many steps are planned."""

    name = "constant"
    depends_on_steps = False

    def after_warmup(self, step: int, steps: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the full rate down to `floor` times it (Loshchilov and Hutter 2017, equation 5)."""

    name = "cosine"
    floor: float = 0.0

    def after_warmup(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


@dataclass(frozen=True)
class Steps(Schedule):
    """The rate is multiplied by `gamma` at each of the given fractions of the steps that follow the warm-up.

    >>> [Steps(at=(0.5, 0.75), gamma=0.1).factor(step, 8) for step in (0, 4, 6)]
    [1.0, 0.1, 0.010000000000000002]
    """

    name = "steps"
    at: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(fraction > 1 for fraction in self.at):
            raise InputError(
                f"Steps: at holds fractions of the run, from 0 to 1, got {self.at}; divide numbers of steps by `steps`"
            )

    def after_warmup(self, step: int, steps: int) -> float:
        return self.gamma ** sum(step >= round(fraction * steps, 6) for fraction in self.at)
