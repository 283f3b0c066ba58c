"""Median over prompts: a value to write that one odd reference prompt does not move."""

from dataclasses import dataclass
from typing import Any

import torch

from hooklens import Replacement


@dataclass(frozen=True, eq=False)
class MedianOver(Replacement):
    """The median over reference prompts, by position where they have the length of those written to, else over all.

    >>> import hooklens as hl
    >>> from hooklens.testing import tiny_model
    >>> model, value = tiny_model(), MedianOver([[7, 8, 9], [1, 2, 4], [3, 3, 3]])
    >>> hl.ablate(model, [[1, 2, 3], [4, 5, 6]], hl.prob(model, answer=5), value=value).replacement
    'median over'
    """

    reference: Any

    def write(self, target):
        rows = target.rows(self.reference)
        runs = [target.read(row[None]) for row in rows]
        if target.fits(rows):
            return {name: torch.cat([run[name] for run in runs]).median(0).values for name in target.points}
        return {name: torch.cat([run[name][0] for run in runs]).median(0).values for name in target.points}
