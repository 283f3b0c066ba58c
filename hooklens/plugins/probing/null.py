"""The null distribution of a probing study: shuffled labels that go through the study's own folds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.plugins.probing.balancing import balanced
from hooklens.plugins.probing.folds import Classes, Fold, shuffled_in_folds
from hooklens.plugins.probing.many import FitsMany
from hooklens.plugins.probing.probes import ProbeKind

_DRAWS = 99  # shuffled labellings: a probe is trained on each, at every point
_PER_POINT = 20  # with 20 draws a point, one point alone can reach q <= 0.05 over all points


@dataclass(frozen=True)
class Null:
    """Shuffled labels: all are fitted at every point; the first `n_nested` also choose a point as the real labels do.

    `least_p` is the smallest p-value possible with this number of draws: where labels can be shuffled in few ways, some
    draws equal the real labels (or the real labels with two classes renamed, which are read equally well).
    """

    labels: Int[Tensor, "draw example"]
    n_nested: int
    chooses: bool

    @classmethod
    def of(
        cls,
        label: Classes,
        group: Classes,
        folds: Sequence[Fold],
        draws: int | None,
        n_points: int,
        kind: ProbeKind,
        seed: int,
    ) -> "Null":
        """Draw `draws` shuffles; by default 99, and 20 per point for kinds that fit many labellings at once.

        A kind that fits one labelling at a time uses the points that the real labels chose: choosing again in every
        draw would cost a whole study per draw.
        """
        generator, many = seeded(seed), isinstance(kind, FitsMany)
        nested = _DRAWS if draws is None else draws
        n = max(nested, _PER_POINT * n_points) if draws is None and many and n_points > 1 else nested
        made = [shuffled_in_folds(label, group, folds, generator) for _ in range(n)]
        return cls(torch.stack(made) if made else label.new_zeros(0, len(label)), nested, many)

    def least_p(self, label: Classes) -> float:
        """The smallest possible p-value with these draws."""
        same = (self.labels == label).all(1)
        if int(label.max()) == 1:
            same |= (self.labels == 1 - label).all(1)
        return float(same.sum() + 1) / (len(self.labels) + 1)

    def scores(self, right: Bool[Tensor, "point draw example"]) -> Float[Tensor, "draw point"]:
        """The balanced accuracy of each draw at each point."""
        return torch.stack([balanced(one.double(), self.labels) for one in right], 1)

    def nested(
        self,
        right: Bool[Tensor, "point draw example"],
        chosen: Int[Tensor, "labelling fold"],
        fold: Int[Tensor, "example"],
    ) -> Float[Tensor, "nested_draw"]:
        """The balanced accuracy of each draw at the points that it (or else the real labels) chose in inner folds."""
        chosen = (chosen[1:] if self.chooses else chosen.expand(self.n_nested, -1))[:, fold]  # draw example
        draw, example = torch.arange(len(chosen))[:, None], torch.arange(len(fold))
        return balanced(right[chosen, draw, example].double(), self.labels[: self.n_nested])
