"""Control tasks: random labels that can only be memorised, scored in the same folds as the real labels."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.plugins.probing.folds import Classes, Fold, split
from hooklens.plugins.probing.scoring import Trainer
from hooklens.results.statistics import group_numbers

_LABELLINGS = 5
_TRIES = 30
_FEWEST_TYPES = 8  # with fewer types, a random label per type is an easy task and does not test memory


@dataclass(frozen=True)
class ControlTasks:
    """Random labels of types, with folds where each type is in training and test; none if `missing` gives a reason.

    `by` says what was labelled: "token", or "group" if tokens do not recur.
    """

    by: str | None
    missing: str
    label: Int[Tensor, "labelling example"]
    real: Int[Tensor, "example"]
    folds: list[list[Fold]]

    @classmethod
    def of(
        cls, real: Classes, token: Classes, text: Classes, group: Classes, *, folds: int, seed: int
    ) -> "ControlTasks":
        """Draw labellings of the examples' tokens or groups until each can be split into folds.

        >>> rows = torch.arange(40)
        >>> control = ControlTasks.of(rows % 2, rows % 10, rows, rows, folds=5, seed=0)
        >>> control.by, control.label.shape
        ('token', torch.Size([5, 40]))
        """
        types, by = control_types(token, text, group)
        none, shares, labels, parts = real.new_zeros(0, len(real)), (real.bincount() / len(real)).tolist(), [], []
        if types is None:
            return cls(None, "token or group: none recurs", none, real, [])
        generator = seeded(seed)
        for _ in range(_TRIES):
            label = control_labels(types, shares, generator)
            if part := _parts(real, label, text, folds, seed):
                labels.append(label)
                parts.append(part)
            if len(labels) == _LABELLINGS:
                return cls(by, "", torch.stack(labels), real, parts)
        return cls(None, f"{by}: too few for {len(shares)} classes", none, real, [])

    def scores(self, x: np.ndarray, trainer: Trainer) -> Float[Tensor, "task labelling example"]:
        """Correctness on the random labels and on the real labels, fitted and tested on the same rows."""
        right = torch.zeros(2, len(self.label), len(x), dtype=torch.float64)
        for i, (label, parts) in enumerate(zip(self.label, self.folds, strict=True)):
            right[:, i] = trainer.correct(x, torch.stack([label, self.real]), parts)
        return right


def _parts(real: Classes, label: Classes, text: Classes, folds: int, seed: int) -> list[Fold]:
    """Folds stratified by both labels if possible, else by the random labels; empty if neither is possible.

    Identical prompts stay together: otherwise memorising a row would suffice instead of memorising a type.
    """
    candidates: list[list[Fold]] = [[]]
    if len(label.unique()) > 1:
        for strata in (real * (int(label.max()) + 1) + label, label):
            with suppress(InputError):
                candidates.append(split(strata, text, folds, seed))
    return max(candidates, key=len)


def control_types(token: Classes, prompt: Classes, group: Classes) -> tuple[Classes | None, str]:
    """The unit that a control task labels at random: the token that is read, or the group if few tokens recur.

    None if neither recurs in several prompts: then nothing can be memorised.

    >>> control_types(torch.tensor([5] * 20), torch.arange(20), torch.arange(20) % 10)[1]
    'group'
    """
    for types, name in ((token, "token"), (group, "group")):
        number = group_numbers(len(types), types)
        n_prompts = torch.stack([number, prompt], 1).unique(dim=0)[:, 0].bincount()
        if len(n_prompts) >= _FEWEST_TYPES and float((n_prompts > 1)[number].double().mean()) >= 0.5:
            return number, name
    return None, ""


def control_labels(types: Classes, shares: Sequence[float], generator: torch.Generator) -> Classes:
    """A random class for every type, with about the class shares of the real labels.

    >>> control_labels(torch.tensor([0, 1, 0, 2, 3]), [0.5, 0.5], torch.Generator().manual_seed(1)).tolist()
    [0, 1, 0, 1, 0]

    Reference: Hewitt and Liang (2019), "Designing and Interpreting Probes with Control Tasks", section 2.
    """
    n = int(types.max()) + 1
    ends = (torch.tensor(shares, dtype=torch.float64).cumsum(0) * n).round().long()
    of_type = torch.bucketize(torch.arange(n), ends[:-1], right=True)
    return of_type[torch.randperm(n, generator=generator)][types]
