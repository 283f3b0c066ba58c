"""Angles between probe directions: cosines, compared with those of shuffled labels and of random directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError
from hooklens.core.names import Where
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.probing.folds import shuffled, split
from hooklens.plugins.probing.gathering import task_rows
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.probes import MassMean, ProbeKind, kind_name
from hooklens.plugins.probing.scoring import Trainer
from hooklens.plugins.probing.task import ProbeTask
from hooklens.results.result import Result, Table
from hooklens.results.statistics import null_p, q_values

_DRAWS = 200  # shuffled labellings: a direction is fitted to each, at every task
_MASS_MEAN = MassMean()


@dataclass(frozen=True, eq=False)
class Geometry(Result):
    """Cosines between the directions of several tasks at one point, and the cosines expected by chance.

    `repeat` is the cosine of a task's two directions from halves that share no group (NaN if a class occurs in one
    group only): no other cosine can be expected to exceed it. `null[draw]` contains the cosines of directions fitted on
    shuffled labels: in data that vary in few dimensions these meet at smaller angles than random directions, of which
    95 % lie below `isotropic`.
    """

    ranked_by = "cosine"

    terms = {"95% of shuffled": "the cosine below which 95 % of directions fitted on shuffled labels lie"}

    point: str
    kind: str
    names: list[str]
    cosine: Float[Tensor, "task other"]
    repeat: Float[Tensor, "task"]
    null: Float[Tensor, "draw task other"]
    isotropic: float

    @property
    def p(self) -> Float[Tensor, "task other"]:
        """How often shuffled labels give directions as parallel, regardless of sign; NaN for a task with itself."""
        return null_p(self.cosine.abs(), self.null.abs()).fill_diagonal_(float("nan"))

    @property
    def q(self) -> Float[Tensor, "task other"]:
        """Benjamini-Hochberg over all pairs of tasks, each counted once."""
        above = q_values(self.p.where(self._pairs(), torch.nan))
        return above.where(self._pairs(), above.T)

    def _pairs(self) -> Bool[Tensor, "task other"]:
        """Each pair of different tasks once."""
        return torch.ones_like(self.cosine, dtype=torch.bool).triu(1)

    def table(self, n: int | None = None) -> Table:
        """One row per pair of tasks, the most parallel first."""
        bound, p, q = self.null.abs().quantile(0.95, dim=0), self.p, self.q
        rows = []
        for i, j in self._pairs().nonzero().tolist():
            rows.append((self.names[i], self.names[j], self.cosine[i, j], bound[i, j], p[i, j], q[i, j]))
        rows.sort(key=lambda row: -abs(float(row[2])))
        return Table(("task", "other", "cosine", "95% of shuffled", "p", "q"), rows).head(n)

    def figure(self) -> Any:
        """The matrix of cosines; the diagonal shows the cosine of the directions of two halves of one task."""
        from hooklens.viz.figures import heatmap

        shown = self.cosine.clone()
        shown.diagonal().copy_(self.repeat)
        title = f"Cosines of {self.kind} directions at {self.point} (95 % of isotropic ones below {self.isotropic:.2f})"
        return heatmap(shown, x=self.names, y=self.names, title=title, colourbar="cosine")


def measure_geometry(
    model: HookedTransformer,
    tasks: Sequence[ProbeTask],
    *,
    site: Where,
    kind: ProbeKind = _MASS_MEAN,
    draws: int = _DRAWS,
    seed: int = 0,
) -> Geometry:
    """Are the directions of several two-class tasks at one point more parallel than expected by chance?

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(); tasks = [odd_first(model, seed=seed) for seed in (0, 1)]
    >>> geometry = measure_geometry(model, tasks, site=("resid_post", 0), draws=20)
    >>> geometry.cosine.shape, geometry.null.shape                # task other; draw task other
    (torch.Size([2, 2]), torch.Size([20, 2, 2]))

    Reference: Cai, Fan and Jiang (2013), "Distributions of Angles in Random Packing on Spheres", for `isotropic`.
    """
    from scipy.stats import beta

    name, generator = kind_name(kind), seeded(seed)
    whole("draws", draws, 1)
    point, dtype, rows = task_rows(model, tasks, site)
    real, repeat, null = [], [], []
    for task, x in zip(tasks, rows, strict=True):
        labels = [task.label, *(shuffled(task.label, task.group, generator) for _ in range(draws))]
        direction, *of_shuffled = (direction_of(kind, x, label) for label in labels)
        real.append(direction)
        repeat.append(_repeat(kind, x, task, seed))
        null.append(torch.stack(of_shuffled))
    directions, drawn = torch.stack(real), torch.stack(null, 1)
    n = directions.shape[1]
    return Geometry(
        point=point,
        kind=name,
        names=[task.name for task in tasks],
        cosine=(directions @ directions.T).to(dtype),
        repeat=torch.tensor(repeat, dtype=dtype),
        null=(drawn @ drawn.mT).to(dtype),
        isotropic=float(beta.ppf(0.95, 0.5, (n - 1) / 2)) ** 0.5 if n > 1 else 1.0,
    )


def _repeat(kind: ProbeKind, x: np.ndarray, task: ProbeTask, seed: int) -> float:
    """The cosine of the directions of two halves that contain both classes and share no group; NaN if impossible."""
    try:
        first_half, second_half, _ = split(task.label, task.group, 2, seed)[0]
    except InputError:
        return float("nan")
    first, second = (direction_of(kind, x[half], task.label[half]) for half in (first_half, second_half))
    return float(first @ second)


def direction_of(kind: ProbeKind, x: np.ndarray, label: Int[Tensor, "example"]) -> Float[Tensor, "d"]:
    """The unit vector from class 0 to class 1 of a probe that is fitted on all rows."""
    step = Trainer(kind, 2).fit(x, label.numpy()).step
    across = torch.from_numpy(step[1] - step[0])
    return across / across.norm().clamp_min(1e-300)


def demo(model: HookedTransformer) -> Geometry:
    """Odd first tokens in two draws of random prompts, at the first layer; works on any model, without a tokenizer."""
    tasks = [odd_first(model, seed=seed) for seed in (0, 1)]
    return measure_geometry(model, tasks, site="blocks.0.hook_resid_post", draws=50)
