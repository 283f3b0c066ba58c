"""Does a probe trained on one data set work on another? A matrix of accuracies, out of fold on the diagonal."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.names import Where
from hooklens.core.progress_bar import progress
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.probing.folds import Fold, make_folds, shuffled, shuffled_in_folds
from hooklens.plugins.probing.gathering import task_rows
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.probes import MassMean, ProbeKind, Weights, kind_name
from hooklens.plugins.probing.scoring import Trainer
from hooklens.plugins.probing.task import ProbeTask
from hooklens.results.result import Result
from hooklens.results.statistics import Tested, auc, mean_interval, null_p
from hooklens.results.table import Table

_DRAWS = 99  # shuffled labellings: a probe is trained on each, for every task
_MASS_MEAN = MassMean()
Scored = tuple[Float[Tensor, "example"], Float[Tensor, "null draw"]]  # the score of class 1, the AUCs of two nulls


@dataclass(frozen=True, eq=False)
class Transfer(Tested, Result):
    """Accuracy and AUC of the probe of each task (row) on the examples of each task (column).

    Examples that share a prompt or an entity with the training task are left out (`n` remain; NaN if none does). The
    diagonal contains out-of-fold predictions. If the AUC stays high while the accuracy falls, the direction transfers
    and the threshold does not. `majority` is the share of the most common class. `null[0]` is the AUC of probes trained
    on shuffled labels: where activations vary in few dimensions, any direction may separate classes. `null[1]` is the
    AUC of the probe on shuffled labels of the tested task, used for `p`. On the diagonal both are the AUC of shuffled
    labels that were used for training and testing in the same folds.
    """

    ranked_by = "AUC on another task"
    terms = {
        "95% of shuffled training": "the AUC below which 95 % of probes trained on shuffled labels lie",
    }

    point: str
    kind: str
    names: list[str]
    accuracy: Float[Tensor, "trained tested"]
    low: Float[Tensor, "trained tested"]
    high: Float[Tensor, "trained tested"]
    auc: Float[Tensor, "trained tested"]
    null: Float[Tensor, "null draw trained tested"]
    n: Int[Tensor, "trained tested"]
    majority: Float[Tensor, "tested"]

    @property
    def p(self) -> Float[Tensor, "trained tested"]:
        """How often the probe has an AUC as large on shuffled labels of the tested task; NaN without an AUC."""
        return null_p(self.auc, self.null[1])

    def table(self, n: int | None = None) -> Table:
        """One row per pair of tasks."""
        ends = ("accuracy", "95% low", "95% high", "most common")
        columns = ("trained on", "tested on", *ends, "AUC", "95% of shuffled training", "p", "q", "examples")
        cells = [self.accuracy, self.low, self.high, self.majority.expand_as(self.auc), self.auc]
        cells += [self.null[0].quantile(0.95, dim=0), self.p, self.q, self.n]
        pairs = product(range(len(self.names)), repeat=2)
        rows = [(self.names[i], self.names[j], *(cell[i, j] for cell in cells)) for i, j in pairs]
        return Table(columns, rows).head(n)

    @property
    def ranking(self) -> Float[Tensor, "pair"]:
        """The AUC of every pair of different tasks; a task and itself have no rank."""
        return self.auc.clone().fill_diagonal_(torch.nan).flatten()

    def figure(self) -> Any:
        """The AUC of every pair; the hover box shows the accuracy and q."""
        from hooklens.viz.figures import heatmap

        boxes = [
            [f"accuracy {float(x):.2f}, q {float(q):.3f}" for x, q in zip(*row, strict=True)]
            for row in zip(self.accuracy, self.q, strict=True)
        ]
        title = f"{self.kind} probes at {self.point}: trained on the row, tested on the column"
        names: dict[str, Any] = {"x": self.names, "y": self.names, "x_title": "tested on", "y_title": "trained on"}
        return heatmap(self.auc, **names, title=title, hover=boxes, colourbar="AUC", zmid=0.5)


def transfer_probe(
    model: HookedTransformer,
    tasks: Sequence[ProbeTask],
    *,
    site: Where,
    kind: ProbeKind = _MASS_MEAN,
    folds: int = 5,
    draws: int = _DRAWS,
    seed: int = 0,
) -> Transfer:
    """Does the probe of one task work on the others, at one point of the model? Each task has two classes.

    >>> from hooklens.testing import tiny_model
    >>> transfer = demo(tiny_model())
    >>> transfer.accuracy.shape, transfer.null.shape              # trained tested; null draw trained tested
    (torch.Size([2, 2]), torch.Size([2, 19, 2, 2]))

    Reference: Marks and Tegmark (2023), "The Geometry of Truth", generalisation between data sets.
    """
    name, trainer, generator = kind_name(kind), Trainer(kind, 2), seeded(seed)
    whole("draws", draws, 1)
    point, dtype, rows = task_rows(model, tasks, site)
    size = (len(tasks), len(tasks))
    cells = {name: torch.full(size, float("nan"), dtype=dtype) for name in ("accuracy", "low", "high", "auc")}
    null, n = torch.full((2, draws, *size), float("nan"), dtype=dtype), torch.zeros(size, dtype=torch.long)
    with progress("tasks", len(tasks), unit="tasks") as advance:
        for i, trained in enumerate(tasks):
            shuffles = [shuffled(trained.label, trained.group, generator) for _ in range(draws)]
            probes = [trainer.fit(rows[i], label.numpy()) for label in (trained.label, *shuffles)]
            for j, tested in enumerate(tasks):
                kept = torch.arange(len(tested)) if i == j else _apart(trained, tested)
                n[i, j], x, label, group = len(kept), rows[j][kept.numpy()], tested.label[kept], tested.group[kept]
                if not len(kept):
                    continue
                if i == j:
                    parts = make_folds(label, group, folds=folds, seed=seed)
                    score, nulls = _out_of_fold(x, label, group, parts, trainer=trainer, draws=draws, seed=seed)
                else:
                    score, nulls = _of_others(x, label, group, probes, generator)
                right = ((score > 0) == (label == 1)).double()
                ends = mean_interval(right, group=group)
                for cell, value in zip(cells.values(), (right.mean(), *ends, auc(score, label == 1)), strict=True):
                    cell[i, j] = value
                null[:, :, i, j] = nulls
            advance()
    majority = torch.stack([task.label.bincount(minlength=2).max() / len(task) for task in tasks]).to(dtype)
    return Transfer(point, name, [task.name for task in tasks], **cells, null=null, n=n, majority=majority)


def _of_others(
    x: np.ndarray, label: Tensor, group: Tensor, probes: list[Weights], generator: torch.Generator
) -> Scored:
    """Predictions for another task's examples, with two nulls: probes of shuffled labels, and shuffled test labels."""
    score, *of_shuffled = (_margin(torch.from_numpy(probe.logits(x))) for probe in probes)
    of_labels = [auc(score, shuffled(label, group, generator) == 1) for _ in of_shuffled]
    return score, torch.stack([auc(torch.stack(of_shuffled), label == 1), torch.stack(of_labels)])


def _out_of_fold(
    x: np.ndarray, label: Tensor, group: Tensor, parts: list[Fold], *, trainer: Trainer, draws: int, seed: int
) -> Scored:
    """Predictions for examples of the probe's own task, and for shuffled labels in the same folds."""
    generator = seeded(seed)
    labels = torch.stack([label, *(shuffled_in_folds(label, group, parts, generator) for _ in range(draws))])
    margin = _margin(trainer.out_of_fold(x, labels, parts))
    null = torch.stack([auc(row, shuffle == 1) for row, shuffle in zip(margin[1:], labels[1:], strict=True)])
    return margin[0], null.expand(2, -1)


def _margin(logits: Float[Tensor, "*cell n_class"]) -> Float[Tensor, "*cell"]:
    return logits[..., 1] - logits[..., 0]


def _apart(trained: ProbeTask, tested: ProbeTask) -> Int[Tensor, "kept"]:
    """The examples of one task that share no prompt and no entity with the other."""
    entities = {name for names in trained.entities for name in names}
    rows, shared = tested.token_rows(), set(trained.token_rows())
    kept = [i for i, row in enumerate(rows) if row not in shared and not entities & set(tested.entities[i])]
    return torch.tensor(kept, dtype=torch.long)


def demo(model: HookedTransformer) -> Transfer:
    """Odd first tokens in two draws of random prompts, at the first layer; works on any model, without a tokenizer."""
    tasks = [odd_first(model, seed=seed) for seed in (0, 1)]
    return transfer_probe(model, tasks, site="blocks.0.hook_resid_post", draws=19)
