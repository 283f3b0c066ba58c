"""Divergence: a loss or gradient that is no finite number, or a loss that has grown far beyond its start."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hooklens.core.errors import HooklensError

_TIMES = 3.0  # times the first loss, as the mean of the last steps
_WINDOW = 20  # steps of that mean


class Diverged(HooklensError, ArithmeticError):
    """The loss became NaN, infinite or far larger than at the start."""


@dataclass
class LossWatch:
    """The first loss and the last ones: what says whether a run diverges, and belongs to its state.

    >>> watch = LossWatch()
    >>> watch.fault(0, 2.0, 1.0), watch.fault(1, float("nan"), 1.0)
    (None, 'the loss of step 1 is nan (first 2)')
    """

    first: float | None = None
    last: list[float] = field(default_factory=list)

    def fault(self, step: int, loss: float, gradient: float) -> str | None:
        """What is wrong with the loss and the gradient's norm of a step; None if training may go on."""
        self.first = loss if self.first is None else self.first
        self.last = [*self.last[-_WINDOW + 1 :], loss]
        if not math.isfinite(loss):
            return f"the loss of step {step} is {loss:.4g} (first {self.first:.4g})"
        if not math.isfinite(gradient):
            return f"the gradient of step {step} is not finite (loss {loss:.4g})"
        mean = sum(self.last) / len(self.last)
        if len(self.last) == _WINDOW and mean > _TIMES * abs(self.first) + 1:
            return f"the loss at step {step} is {mean:.4g}, the mean of {_WINDOW} steps (first {self.first:.4g})"
        return None

    def to_json(self) -> dict[str, Any]:
        """The watch as plain values."""
        return {"first": self.first, "last": self.last}


def divergence_message(fault: str, layers: Sequence[str], kept: str) -> str:
    """The message of a run that diverged: what was seen, in which layers, and the last good checkpoint."""
    where = f"; not finite in {', '.join(layers[:4])}" if layers else ""
    return (
        f"training diverged: {fault}{where}. A lower learning rate, warm-up or clip= may help, in a new folder. "
        f"The last checkpoint before it: {kept}"
    )
