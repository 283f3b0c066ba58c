"""Does a probe that was trained on one data set read another? A matrix of accuracies, its diagonal out of fold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.names import Where
from hooklens.plugins.probing.directions import auc
from hooklens.plugins.probing.folds import make_folds
from hooklens.plugins.probing.gather import gather
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.probes import MassMean, ProbeKind
from hooklens.plugins.probing.scoring import as_rows, cross_validate, fit, said
from hooklens.plugins.probing.task import ProbeTask
from hooklens.result import Result
from hooklens.statistics import mean_interval
from hooklens.table import Table

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_MASS_MEAN = MassMean()


@dataclass(frozen=True, eq=False)
class Transfer(Result):
    """Accuracy and AUC of the probe of each task (row) on the examples of each task (column).

    Examples that share a prompt or an entity with the training task are left out (`n` remain; NaN where none does); on
    the diagonal stand out-of-fold predictions. An AUC that stays where accuracy falls says that the direction carries
    over and the threshold does not. `majority` is the share of the most common class.
    """

    point: str
    kind: str
    names: list[str]
    accuracy: Float[Tensor, "trained tested"]
    low: Float[Tensor, "trained tested"]
    high: Float[Tensor, "trained tested"]
    auc: Float[Tensor, "trained tested"]
    n: Int[Tensor, "trained tested"]
    majority: Float[Tensor, "tested"]

    def table(self, n: int | None = None) -> Table:
        """One row a pair of tasks."""
        columns = ("trained on", "tested on", "accuracy", "95% low", "95% high", "AUC", "most common", "examples")
        rows = []
        for i, trained in enumerate(self.names):
            for j, tested in enumerate(self.names):
                numbers = (self.accuracy[i, j], self.low[i, j], self.high[i, j], self.auc[i, j], self.majority[j])
                rows.append((trained, tested, *map(float, numbers), int(self.n[i, j])))
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """The AUC of every pair; in the box the accuracy."""
        from hooklens.viz.figures import heatmap

        boxes = [[f"accuracy {float(x):.2f}" for x in row] for row in self.accuracy]
        title = f"{self.kind} probes at {self.point}: trained on the row, tested on the column"
        names: dict[str, Any] = {"x": self.names, "y": self.names, "x_title": "tested on", "y_title": "trained on"}
        return heatmap(self.auc, **names, title=title, hover=boxes, colourbar="AUC", zmid=0.5)


def transfer(
    model: "HookedTransformer",
    tasks: Sequence[ProbeTask],
    *,
    site: Where,
    kind: ProbeKind = _MASS_MEAN,
    folds: int = 5,
    seed: int = 0,
) -> Transfer:
    """Does the probe of one task read the others, at one point of the model? Tasks have two classes each.

    >>> from hooklens.testing import tiny_model
    >>> demo(tiny_model()).accuracy.shape                      # trained tested
    torch.Size([2, 2])

    Reference: Marks and Tegmark (2023), "The Geometry of Truth", generalisation between data sets.
    """
    if any(len(task.classes) != 2 for task in tasks):
        raise InputError(f"transfer is between tasks of two classes, got {[len(task.classes) for task in tasks]}")
    gathered = [gather(model, task, site=site) for task in tasks]
    points = gathered[0].points
    if len(points) != 1:
        raise InputError(f"probes are transferred at one point, got {', '.join(points)}; give ('name', layer)")
    rows = [as_rows(acts.x[0]) for acts in gathered]
    cells = {name: torch.full((len(tasks), len(tasks)), float("nan")) for name in ("accuracy", "low", "high", "auc")}
    cells = {name: cell.to(gathered[0].x.dtype) for name, cell in cells.items()}
    n = torch.zeros(len(tasks), len(tasks), dtype=torch.long)
    for i, trained in enumerate(tasks):
        weights = fit(kind, rows[i], trained.label.numpy(), 2)
        for j, tested in enumerate(tasks):
            kept = torch.arange(len(tested)) if i == j else _apart(trained, tested)
            n[i, j] = len(kept)
            if i == j:
                parts = make_folds(tested.label, tested.group, folds=folds, seed=seed)
                logits = cross_validate(gathered[i].x[0], tested.label, 2, parts, kind).logits
            else:
                logits = torch.from_numpy(said(rows[j][kept.numpy()], weights))
            if len(kept):
                _fill(cells, i, j, logits, tested.label[kept], tested.group[kept])
    majority = [torch.bincount(task.label, minlength=2).max() / len(task) for task in tasks]
    names = [task.name for task in tasks]
    most = torch.stack(majority).to(gathered[0].x.dtype)
    return Transfer(points[0], getattr(kind, "name", type(kind).__name__), names, **cells, n=n, majority=most)


def _fill(cells: dict[str, Tensor], i: int, j: int, logits: Tensor, label: Tensor, group: Tensor) -> None:
    right = (logits.argmax(1) == label).double()
    cells["accuracy"][i, j] = right.mean()
    cells["low"][i, j], cells["high"][i, j] = mean_interval(right, group=group)
    if len(label.unique()) == 2:
        cells["auc"][i, j] = auc((logits[:, 1] - logits[:, 0])[None], label)[0]


def _apart(trained: ProbeTask, tested: ProbeTask) -> Int[Tensor, "kept"]:
    """The examples of one task that share no prompt and no entity with the other."""
    names = {name for names in trained.entities for name in names}
    texts = {tuple(row.tolist()) for row in trained.tokens}
    rows = [tuple(tested.tokens[i].tolist()) for i in tested.prompt.tolist()]
    kept = [
        i
        for i, (row, own) in enumerate(zip(rows, tested.entities, strict=True))
        if row not in texts and not names & set(own)
    ]
    return torch.tensor(kept, dtype=torch.long)


def demo(model: "HookedTransformer") -> Transfer:
    """Odd first tokens in two draws of random prompts, at the first layer; any model, no tokenizer needed."""
    tasks = [odd_first(model, seed=seed) for seed in (0, 1)]
    return transfer(model, tasks, site="blocks.0.hook_resid_post")
