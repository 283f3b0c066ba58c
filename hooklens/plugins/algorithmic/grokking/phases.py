"""The phases of a run that groks: memorisation, formation of the circuit, cleanup."""

from dataclasses import dataclass
from typing import Any

import torch

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError
from hooklens.plugins.algorithmic.grokking.given_curves import Numbers, given_steps, given_values
from hooklens.results.result import Result, Table

_STILL = 0.9  # of its peak: a held-out loss above it has not begun to fall
_FEWEST = 4  # checkpoints up to generalisation: phases between fewer are those of the checkpoints


@dataclass(frozen=True, eq=False)
class Phases(Result):
    """The steps at which memorisation and the formation of the circuit end, and at which the run has generalised.

    The paper describes the phases and names their ends by eye. The rules are ours, "by excluded loss": memorisation
    ends where the excluded loss is smallest, because from then on the answers to training pairs come more and more from
    the circuit; formation ends, and cleanup begins, at the last checkpoint at which the held-out loss is still at least
    0.9 of its peak; cleanup ends at generalisation. A phase can be empty.
    """

    memorised: int
    formed: int
    cleaned: int

    @property
    def caveat(self) -> str:
        """What these phases do not say; empty where the rules separate all three."""
        if self.formed > self.memorised:
            return ""
        return (
            "Circuit formation is empty: the held-out loss was last at 0.9 of its peak no later than the excluded loss "
            "was smallest, so that these rules do not separate the two phases in this run."
        )

    def table(self, n: int | None = None) -> Table:
        """One row per phase."""
        rows = [
            ("memorisation", 0, self.memorised),
            ("circuit formation", self.memorised, self.formed),
            ("cleanup", self.formed, self.cleaned),
        ]
        return Table(("phase", "from step", "to step"), rows).head(n)

    def figure(self) -> Any:
        """How many steps each phase takes."""
        from hooklens.viz.figures import bars

        rows = self.table().rows
        spans = torch.tensor([float(stop - start) for _, start, stop in rows])
        return bars(spans, labels=[name for name, *_ in rows], title="Phases by excluded loss", y_title="steps")


def find_phases(steps: Numbers, excluded: Numbers, held_out_loss: Numbers, *, generalised_at: int) -> Phases:
    """When did each phase end? From the excluded and the held-out loss at checkpoints.

    >>> steps = torch.tensor([0, 100, 1000, 5000, 8000, 9000])
    >>> excluded = torch.tensor([4.7, 2.0, 0.1, 2.0, 4.0, 4.0])
    >>> held_out = torch.tensor([4.7, 15.0, 20.0, 19.0, 5.0, 0.01])
    >>> print(find_phases(steps, excluded, held_out, generalised_at=9000))
    Phases: memorised 1000, formed 5000, cleaned 9000
    phase              from step  to step
    memorisation               0     1000
    circuit formation       1000     5000
    cleanup                 5000     9000

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 5.2, for
    the phases; the rules are ours.
    """
    steps, generalised_at = given_steps("steps", steps), whole("generalised_at", generalised_at)
    excluded = given_values("excluded", excluded, steps)
    held_out_loss = given_values("held_out_loss", held_out_loss, steps, least=0.0)
    before = steps <= generalised_at
    n_before = int(before.sum())
    if n_before < _FEWEST:
        raise InputError(
            f"phases are read from at least {_FEWEST} checkpoints up to generalisation at step {generalised_at:,}, and "
            f"there are {n_before}; train with more of them (checkpoints=)"
        )
    steps, excluded, held_out_loss = steps[before], excluded[before], held_out_loss[before]
    memorised = int(excluded.argmin())
    still = held_out_loss >= _STILL * held_out_loss.max()
    formed = max(int(still.nonzero()[-1]), memorised)
    return Phases(memorised=int(steps[memorised]), formed=int(steps[formed]), cleaned=int(generalised_at))
