"""Linear probes at every layer, the layer chosen in inner folds, with the controls that an accuracy needs."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.names import Where
from hooklens.data.prompts import Prompts
from hooklens.plugins.probing.balanced import balanced
from hooklens.plugins.probing.control import ControlTasks
from hooklens.plugins.probing.folds import Fold, make_folds
from hooklens.plugins.probing.gather import Activations, gather
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.null import Null
from hooklens.plugins.probing.probes import Logistic, MassMean, Probe, ProbeKind
from hooklens.plugins.probing.scoring import Scored, as_rows, correct, cross_validate, fit, majority, means_of
from hooklens.plugins.probing.study import ProbeStudy
from hooklens.plugins.probing.task import Label, ProbeTask, read_task
from hooklens.progress import progress

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_LOGISTIC = Logistic()


def train_probe(
    model: "HookedTransformer",
    task: ProbeTask,
    *,
    site: Where = "resid_post",
    kind: ProbeKind = _LOGISTIC,
    folds: int = 5,
    null_draws: int = 99,
    folder: str | Path | None = None,
    seed: int = 0,
) -> tuple[Probe, ProbeStudy]:
    """Can a linear probe read this class, where, and how much of that is the model's doing?

    `site` is any site with one vector a position, at every layer or at one: "resid_post", ("z", 3), or a list. `kind`
    is `Logistic()`, `Ridge()`, `MassMean()` or `WhitenedMassMean()`. Folds are stratified and split no prompt and no
    entity; standardisation and fit see a fold's own training examples; the point is chosen by the balanced accuracy in
    inner folds, and what is reached there is reported, beside `null_draws` shuffles of the labels. `folder` keeps the
    activations on disk: see `gather`.

    >>> from hooklens.testing import tiny_model
    >>> probe, study = train_probe(model := tiny_model(), odd_first(model), null_draws=19)
    >>> study.correct.shape, study.table().rows[0][0]          # point example
    (torch.Size([2, 40]), 'logistic probe, point chosen inside')
    >>> round(probe.direction.norm().item(), 6)
    1.0

    Reference: Alain and Bengio (2016), "Understanding intermediate layers using linear classifier probes"; Hewitt and
    Liang (2019), "Designing and Interpreting Probes with Control Tasks".
    """
    acts = gather(model, task, site=site, folder=folder)
    study = _study(acts, task, kind, make_folds(task.label, acts.group, folds=folds, seed=seed), null_draws, seed)
    return study.probe, study


def probe_texts(
    model: "HookedTransformer",
    texts: Prompts,
    labels: Sequence[Label],
    *,
    group: Sequence[Hashable] | None = None,
    pos: int | Sequence[int] = -1,
    site: Where = "resid_post",
    kind: ProbeKind = _LOGISTIC,
    seed: int = 0,
) -> ProbeStudy:
    """Can these labels be read from the last token (or from `pos`) of these texts? See `train_probe`.

    Texts of one `group` share something that could give the label away; they are never split between training and test.
    """
    task = read_task(model, texts, labels, group=group, pos=pos)
    return train_probe(model, task, site=site, kind=kind, seed=seed)[1]


def _study(
    acts: Activations, task: ProbeTask, kind: ProbeKind, folds: list[Fold], null_draws: int, seed: int
) -> ProbeStudy:
    label, n = task.label, len(task.classes)
    control = ControlTasks.of(label, acts.token, task.text_numbers(), acts.group, folds=len(folds), seed=seed)
    null = Null.of(label, acts.group, len(folds), null_draws, len(acts.points), seed)
    scored: list[Scored] = []
    beside: dict[str, list[Tensor]] = {"control": [], "same_split": [], "everywhere": []}
    with progress("probing", len(acts.points), unit="points") as advance:
        for x in acts.x:
            scored.append(cross_validate(x, label, n, folds, kind))
            rows = as_rows(x)
            for name, one in zip(beside, (*control.scores(rows, kind), null.at_a_point(rows, kind)), strict=True):
                beside[name].append(one)
            advance()
    chosen = torch.stack([one.inner for one in scored]).argmax(0)  # the first of those that tie
    right = torch.stack([(one.logits.argmax(1) == label).double() for one in scored])
    best = int(balanced(right, label).argmax())
    everywhere = torch.stack(beside.pop("everywhere"), 1)
    numbers = {name: torch.stack(each, 1) for name, each in beside.items()} | {"correct": right}
    numbers |= _nested(scored, right, chosen, folds) | {"majority": majority(label, folds)}
    numbers |= {"null": null.nested(acts, everywhere, chosen, kind), "point_null": null.scores(everywhere)}
    numbers |= {name: correct(as_rows(getattr(acts, name)), label, n, folds, kind) for name in ("embed", "context")}
    numbers |= _final(acts.x[best], label, n, kind, scored[best])
    return ProbeStudy(
        task=task.name,
        kind=getattr(kind, "name", type(kind).__name__),
        points=acts.points,
        classes=task.classes,
        label=label,
        group=acts.group,
        fold=_fold_of(folds, len(label)),
        chosen=chosen,
        control_label=control.label,
        control_by=control.by,
        no_control=control.missing,
        best=best,
        **{name: value.to(acts.x.dtype) for name, value in numbers.items()},
    )


def _nested(scored: list[Scored], right: Tensor, chosen: Tensor, folds: list[Fold]) -> dict[str, Tensor]:
    """Right or wrong, and the probabilities said, at the point that each example's fold chose without looking at it."""
    fold = _fold_of(folds, right.shape[1])
    here = (chosen[fold], torch.arange(len(fold)))
    logits = torch.stack([one.logits for one in scored])[here]
    factor = torch.stack([one.factor for one in scored])[chosen[fold], fold]
    return {"nested": right[here], "prob": (logits * factor[:, None]).softmax(1)}


def _fold_of(folds: list[Fold], n: int) -> Int[Tensor, "example"]:
    """Which fold tests each example."""
    fold = torch.empty(n, dtype=torch.long)
    for i, one in enumerate(folds):
        fold[torch.from_numpy(one.test)] = i
    return fold


def _final(x: Float[Tensor, "example d"], label: Tensor, n: int, kind: ProbeKind, scored: Scored) -> dict[str, Tensor]:
    """Weights, bias and class means on every example, scaled by the temperature of the folds."""
    rows = as_rows(x)
    weight, bias, step = map(torch.from_numpy, fit(kind, rows, label.numpy(), n))
    factor = float(scored.factor.log().mean().exp())
    return {"weight": weight * factor, "bias": bias * factor, "step": step, "means": means_of(rows, label, n)}


def demo(model: "HookedTransformer") -> ProbeStudy:
    """Is the first token's number odd? Random tokens, read at the last; any model, no tokenizer needed."""
    return train_probe(model, odd_first(model), kind=MassMean(), null_draws=19)[1]
