"""What a study would have found if the labels said nothing: shuffled labels, each drawn in folds of its own."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.plugins.probing.balanced import balanced
from hooklens.plugins.probing.folds import Classes, Fold, drawn
from hooklens.plugins.probing.gather import Activations
from hooklens.plugins.probing.probes import ProbeKind
from hooklens.plugins.probing.scoring import as_rows, correct
from hooklens.progress import progress

_EVERYWHERE = 5  # one draw of so many is fitted at every point, the others where the real labels chose


@dataclass(frozen=True)
class Null:
    """Shuffled labels with their folds; the first `n_everywhere` of them are fitted at every point."""

    labels: Int[Tensor, "draw example"]
    folds: list[list[Fold]]
    n_classes: int
    n_everywhere: int

    @classmethod
    def of(cls, label: Classes, group: Classes, folds: int, draws: int, n_points: int, seed: int) -> "Null":
        """That many shuffles of labels; all are fitted everywhere where there is one point."""
        generator = torch.Generator().manual_seed(seed)
        made = [drawn(label, group, folds, generator, seed) for _ in range(draws)]
        labels = torch.stack([one for one, _ in made]) if made else label.new_zeros(0, len(label))
        few = draws if n_points == 1 else -(-draws // _EVERYWHERE)
        return cls(labels, [parts for _, parts in made], int(label.max()) + 1, few)

    def at_a_point(self, x: np.ndarray, kind: ProbeKind) -> Float[Tensor, "few example"]:
        """Right or wrong about the first draws at one point."""
        right = torch.zeros(self.n_everywhere, len(x), dtype=torch.float64)
        for i in range(self.n_everywhere):
            right[i] = correct(x, self.labels[i], self.n_classes, self.folds[i], kind)
        return right

    def scores(self, right: Float[Tensor, "few point example"]) -> Float[Tensor, "few point"]:
        """The balanced accuracy of each draw at each point."""
        found = [balanced(one, label) for one, label in zip(right, self.labels, strict=False)]
        return torch.stack(found) if found else right.new_zeros(right.shape[:2])

    def nested(
        self,
        acts: Activations,
        everywhere: Float[Tensor, "few point example"],
        chosen: Int[Tensor, "fold"],
        kind: ProbeKind,
    ) -> Float[Tensor, "draw"]:
        """The balanced accuracy of each draw at the points that the real labels chose, fold by fold.

        Whichever point is taken without looking at the test examples, the accuracy of such labels there is that of
        chance; choosing anew in every draw would cost a whole study each.
        """
        rows = {p: as_rows(acts.x[p]) for p in set(chosen.tolist())} if len(self.labels) > self.n_everywhere else {}
        found = []
        with progress("shuffled labels", len(self.labels), unit="draws") as advance:
            for i, (label, folds) in enumerate(zip(self.labels, self.folds, strict=True)):
                right = torch.zeros(len(label), dtype=torch.float64)
                for fold, point in zip(folds, chosen.tolist(), strict=False):
                    test = torch.from_numpy(fold.test)
                    if i < self.n_everywhere:
                        right[test] = everywhere[i, point, test]
                    else:
                        right[test] = correct(rows[point], label, self.n_classes, [fold], kind)[test]
                found.append(balanced(right, label))
                advance()
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)
