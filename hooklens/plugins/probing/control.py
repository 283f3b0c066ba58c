"""Control tasks: random labels that can only be memorised, scored in the same folds as the real labels."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.plugins.probing.folds import Classes, Fold, control_labels, control_types, split
from hooklens.plugins.probing.probes import ProbeKind
from hooklens.plugins.probing.scoring import predicted

_LABELLINGS = 5
_TRIES = 30


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
        >>> made = ControlTasks.of(rows % 2, rows % 10, rows, rows, folds=5, seed=0)
        >>> made.by, made.label.shape
        ('token', torch.Size([5, 40]))
        """
        found = control_types(token, text, group)
        none = real.new_zeros(0, len(real))
        if found is None:
            return cls(None, "token or group: none recurs", none, real, [])
        (types, by), generator = found, seeded(seed)
        shares = (torch.bincount(real) / len(real)).tolist()
        made: list[tuple[Classes, list[Fold]]] = []
        for _ in range(_TRIES):
            label = control_labels(types, shares, generator)
            parts = _parts(real, label, text, folds, seed)
            made += [(label, parts)] if parts else []
            if len(made) == _LABELLINGS:
                return cls(by, "", torch.stack([one for one, _ in made]), real, [one for _, one in made])
        return cls(None, f"{by}: too few for {len(shares)} classes", none, real, [])

    def scores(
        self, x: np.ndarray, kind: ProbeKind
    ) -> tuple[Float[Tensor, "labelling example"], Float[Tensor, "labelling example"]]:
        """Correctness on the random labels and on the real labels, fitted and tested on the same rows."""
        n, none = int(self.real.max()) + 1, torch.zeros(0, len(x), dtype=torch.float64)
        if not self.folds:
            return none, none
        both = [torch.stack([label, self.real]) for label in self.label]
        right = torch.stack(
            [predicted(x, one, n, parts, kind).argmax(2) == one for one, parts in zip(both, self.folds, strict=True)]
        ).double()
        return right[:, 0], right[:, 1]


def _parts(real: Classes, label: Classes, text: Classes, folds: int, seed: int) -> list[Fold]:
    """Folds stratified by both labels if possible, else by the random labels; empty if neither is possible.

    Identical prompts stay together: otherwise memorising a row would suffice instead of memorising a type.
    """
    if len(label.unique()) < 2:
        return []
    made = []
    for strata in (real * (int(label.max()) + 1) + label, label):
        try:
            made.append(split(strata, text, folds, seed, "the control task"))
        except InputError:
            made.append([])
    return [Fold(train, test, ()) for train, test in max(made, key=len)]
