"""Linear probes at every layer; the layer is chosen in inner folds, and the accuracy is reported with its controls."""

import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.names import Where
from hooklens.core.progress_bar import progress, say_estimate
from hooklens.data.prompts import Prompts
from hooklens.plugins.probing.balancing import balanced
from hooklens.plugins.probing.control import ControlTasks
from hooklens.plugins.probing.folds import Fold, make_folds
from hooklens.plugins.probing.gathering import Activations, gather
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.null import Null
from hooklens.plugins.probing.probes import Logistic, MassMean, Probe, ProbeKind
from hooklens.plugins.probing.scoring import Scored, as_rows, asked, correct, cross_validate, fit, majority, means_of
from hooklens.plugins.probing.study import ProbeStudy
from hooklens.plugins.probing.task import Label, ProbeTask, read_task

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
    null_draws: int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
) -> tuple[Probe, ProbeStudy]:
    """Can a linear probe read this class, at which layer, and how much of that is due to the model?

    `site` is any site with one vector per position, at every layer or at one: "resid_post", ("z", 3), or a list. `kind`
    is `Logistic()`, `Ridge()`, `MassMean()` or `WhitenedMassMean()`. Folds are stratified and never split a prompt or
    an entity; standardisation and fit use only the fold's training examples. The point is chosen by the balanced
    accuracy in inner folds, and the accuracy at this point is reported, with `null_draws` shuffles of the labels: by
    default 99, and 20 per layer for the p-values of single layers. `folder` stores the activations on disk: see
    `gather`.

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
    study = _study(
        acts,
        task,
        kind=kind,
        folds=make_folds(task.label, acts.group, folds=folds, seed=seed),
        null_draws=null_draws,
        seed=seed,
    )
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

    Texts of one `group` share something that could reveal the label; they are never split between training and test.
    """
    task = read_task(model, texts, labels, group=group, pos=pos)
    return train_probe(model, task, site=site, kind=kind, seed=seed)[1]


def _study(
    acts: Activations, task: ProbeTask, kind: ProbeKind, folds: list[Fold], null_draws: int | None, seed: int
) -> ProbeStudy:
    label, n, fold = task.label, len(task.classes), _fold_of(folds, len(task.label))
    control = ControlTasks.of(label, acts.token, task.text_numbers(), acts.group, folds=len(folds), seed=seed)
    null = Null.of(label, acts.group, folds=folds, draws=null_draws, n_points=len(acts.points), kind=kind, seed=seed)
    scored, beside = _at_every_point(
        acts, torch.cat([label[None], null.labels]), n=n, folds=folds, kind=kind, control=control, null=null
    )
    chosen = torch.stack([one.inner for one in scored]).argmax(0)  # labelling fold; the first of those that tie
    all_right = torch.stack([one.right for one in scored])
    right = all_right[:, 0].double()
    best = int(balanced(right, label).argmax())
    numbers = dict(
        zip(("control", "same_split"), (torch.stack(one, 1) for one in zip(*beside, strict=True)), strict=True)
    )
    numbers |= _nested(scored, right, chosen[0], fold) | {"majority": majority(label, folds), "correct": right}
    numbers |= {"null": null.nested(all_right[:, 1:], chosen, fold), "point_null": null.scores(all_right[:, 1:])}
    numbers |= {name: correct(as_rows(getattr(acts, name)), label, n, folds, kind) for name in ("embed", "context")}
    numbers |= _final(acts.x[best], label, n, kind, scored[best])
    return ProbeStudy(
        task=task.name,
        kind=getattr(kind, "name", type(kind).__name__),
        points=acts.points,
        classes=task.classes,
        label=label,
        group=acts.group,
        fold=fold,
        chosen=chosen[0],
        control_label=control.label,
        control_by=control.by,
        no_control=control.missing,
        best=best,
        least_p=null.least_p(label),
        **{name: value.to(acts.x.dtype) for name, value in numbers.items()},
    )


def _at_every_point(
    acts: Activations, labels: Tensor, n: int, folds: list[Fold], kind: ProbeKind, control: ControlTasks, null: Null
) -> tuple[list[Scored], list[tuple[Tensor, Tensor]]]:
    """Predictions of probes for the real and the shuffled labels at each point, and for the control task."""
    n_inner = 1 + null.n_nested if null.chooses else 1
    scored, beside = [], []
    controls = sum(map(len, control.folds))
    fits = sum(len(labels) + len(fold.inner) * n_inner for fold in folds) + 2 * controls  # at each point
    say_estimate(
        f"probes at {len(acts.points)} points", _a_fit(acts.x[0], labels, n, folds[0], kind) * fits * len(acts.x)
    )
    with progress("probing", len(acts.points), unit="points") as advance:
        for x in acts.x:
            scored.append(cross_validate(x, labels, n, folds, kind, n_inner=n_inner))
            beside.append(control.scores(as_rows(x), kind))
            advance()
    return scored, beside


def _a_fit(x: Float[Tensor, "example d"], labels: Tensor, n: int, fold: Fold, kind: ProbeKind) -> float:
    """Estimate the seconds per fit of one labelling in one fold, when all labellings are fitted together."""
    rows, start = as_rows(x), time.perf_counter()
    asked(kind, rows, labels=labels.cpu(), train=fold.train, test=fold.test, n_classes=n)
    return (time.perf_counter() - start) / len(labels)


def _nested(scored: list[Scored], right: Tensor, chosen: Tensor, fold: Tensor) -> dict[str, Tensor]:
    """Correctness and predicted probabilities at the point that each example's fold chose in its inner folds."""
    here = (chosen[fold], torch.arange(len(fold)))
    logits = torch.stack([one.logits for one in scored])[here]
    factor = torch.stack([one.factor for one in scored])[chosen[fold], fold]
    return {"nested": right[here], "prob": (logits * factor[:, None]).softmax(1)}


def _fold_of(folds: list[Fold], n: int) -> Int[Tensor, "example"]:
    """The fold whose test rows contain each example."""
    fold = torch.empty(n, dtype=torch.long)
    for i, one in enumerate(folds):
        fold[torch.from_numpy(one.test)] = i
    return fold


def _final(x: Float[Tensor, "example d"], label: Tensor, n: int, kind: ProbeKind, scored: Scored) -> dict[str, Tensor]:
    """Weights, bias and class means fitted on all examples, scaled by the temperature of the folds."""
    rows = as_rows(x)
    weight, bias, step = map(torch.from_numpy, fit(kind, rows, label.numpy(), n))
    factor = float(scored.factor.log().mean().exp())
    return {"weight": weight * factor, "bias": bias * factor, "step": step, "means": means_of(rows, label, n)}


def demo(model: "HookedTransformer") -> ProbeStudy:
    """Is the first token's number odd? Random tokens, read at the last; works on any model, without a tokenizer."""
    return train_probe(model, odd_first(model), kind=MassMean(), null_draws=19)[1]
