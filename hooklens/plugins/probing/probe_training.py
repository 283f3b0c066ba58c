"""Linear probes at every layer; the layer is chosen in inner folds, and the accuracy is reported with its controls."""

import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.names import Where
from hooklens.core.progress_bar import progress, say_estimate
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.probing.balancing import balanced
from hooklens.plugins.probing.control import ControlTasks
from hooklens.plugins.probing.folds import Fold, make_folds, shuffled_in_folds
from hooklens.plugins.probing.gathering import Activations, gather
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.probes import FitsMany, Logistic, MassMean, Probe, ProbeKind, class_means, kind_name
from hooklens.plugins.probing.scoring import Scored, Trainer, as_rows, majority
from hooklens.plugins.probing.study import ProbeStudy
from hooklens.plugins.probing.task import PerPrompt, ProbeTask, checked_task, read_task

_LOGISTIC = Logistic()
_NULL_DRAWS = 99  # shuffled labellings: a probe is trained on each, at every point
_PER_POINT = 20  # with 20 draws a point, one point alone can reach q <= 0.05 over all points


def train_probe(
    model: HookedTransformer,
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
    kind_name(kind)  # raises if it is none
    whole("null_draws", null_draws or 0)
    parts = make_folds(checked_task(task).label, task.group, folds=folds, seed=seed)
    acts = gather(model, task, site=site, folder=folder)
    study = _study(acts, task, kind, parts, null_draws=null_draws, seed=seed)
    return study.probe, study


def probe_texts(
    model: HookedTransformer,
    texts: Prompts | PromptPairs,
    labels: PerPrompt | None = None,
    *,
    group: PerPrompt | None = None,
    pos: int | PerPrompt = -1,
    site: Where = "resid_post",
    kind: ProbeKind = _LOGISTIC,
    seed: int = 0,
) -> ProbeStudy:
    """Can these labels be read from the last token (or from `pos`) of these texts? See `train_probe` and `read_task`.

    Texts of one `group` share something that could reveal the label; they are never split between training and test.
    """
    task = read_task(model, texts, labels, group=group, pos=pos)
    return train_probe(model, task, site=site, kind=kind, seed=seed)[1]


def _study(
    acts: Activations, task: ProbeTask, kind: ProbeKind, folds: list[Fold], null_draws: int | None, seed: int
) -> ProbeStudy:
    label, fold, trainer = task.label, _fold_of(folds, len(task.label)), Trainer(kind, len(task.classes))
    control = ControlTasks.of(label, acts.token, task.text_numbers(), acts.group, folds=len(folds), seed=seed)
    shuffles, n_nested = _shuffles(acts, label, folds, kind, draws=null_draws, seed=seed)
    labels = torch.cat([label[None], shuffles])
    scored, in_control = _at_every_point(acts, labels, folds, trainer, control=control, n_nested=n_nested)
    chosen = torch.stack([point.inner for point in scored]).argmax(0)  # labelling fold; the first of those that tie
    chosen_by_null = chosen[1:] if len(chosen) > 1 else chosen.expand(n_nested, -1)
    right, examples = torch.stack([point.right for point in scored]), torch.arange(len(label))
    correct, nulls = right[:, 0].double(), right[:, 1:]
    nested_null = nulls[chosen_by_null[:, fold], torch.arange(n_nested)[:, None], examples].double()
    best = int(balanced(correct, label).argmax())
    measured = {
        "correct": correct,
        "nested": correct[chosen[0, fold], examples],
        "prob": _probabilities(scored, chosen[0], fold),
        "control": torch.stack([random for random, _ in in_control], 1),
        "same_split": torch.stack([real for _, real in in_control], 1),
        "null": balanced(nested_null, shuffles[:n_nested]),
        "point_null": torch.stack([balanced(point.double(), shuffles) for point in nulls], 1),
        "majority": majority(label, folds),
        "embed": trainer.correct(as_rows(acts.embed), label[None], folds)[0],
        "context": trainer.correct(as_rows(acts.context), label[None], folds)[0],
        **_final(as_rows(acts.x[best]), label, trainer, scored[best]),
    }
    return ProbeStudy(
        task=task.name,
        kind=kind_name(kind),
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
        least_p=_least_p(label, shuffles),
        **{name: value.to(acts.x.dtype) for name, value in measured.items()},
    )


def _shuffles(
    acts: Activations, label: Tensor, folds: list[Fold], kind: ProbeKind, *, draws: int | None, seed: int
) -> tuple[Int[Tensor, "draw example"], int]:
    """Shuffled labellings to fit at every point, and how many of them choose a point in inner folds.

    By default 99, and 20 per point for kinds that fit many labellings at once. A kind that fits one labelling at a
    time uses the points that the real labels chose: choosing again would cost a whole study per draw.
    """
    generator, n_nested = seeded(seed), _NULL_DRAWS if draws is None else draws
    more = draws is None and isinstance(kind, FitsMany) and len(acts.points) > 1
    n = max(n_nested, _PER_POINT * len(acts.points)) if more else n_nested
    shuffles = [shuffled_in_folds(label, acts.group, folds, generator) for _ in range(n)]
    return torch.stack([label, *shuffles])[1:], n_nested


def _least_p(label: Int[Tensor, "example"], shuffles: Int[Tensor, "draw example"]) -> float:
    """The smallest possible p-value with these draws.

    Where labels can be shuffled in few ways, some draws equal the real labels, or the real labels with two classes
    renamed, which are read equally well.
    """
    same = (shuffles == label).all(1)
    if int(label.max()) == 1:
        same |= (shuffles == 1 - label).all(1)
    return float(same.sum() + 1) / (len(shuffles) + 1)


def _at_every_point(
    acts: Activations, labels: Tensor, folds: list[Fold], trainer: Trainer, *, control: ControlTasks, n_nested: int
) -> tuple[list[Scored], list[Tensor]]:
    """Predictions of probes for the real and the shuffled labels at each point, and for the control task."""
    n_inner = 1 + n_nested if isinstance(trainer.kind, FitsMany) else 1
    fits = sum(len(labels) + len(fold.inner) * n_inner for fold in folds) + 2 * sum(map(len, control.folds))
    seconds = _a_fit(as_rows(acts.x[0]), labels, folds[0], trainer) * fits * len(acts.x)
    say_estimate(f"probes at {len(acts.points)} points", seconds)
    scored, in_control = [], []
    with progress("probing", len(acts.points), unit="points") as advance:
        for x in acts.x:
            rows = as_rows(x)
            scored.append(trainer.cross_validate(rows, labels, folds, n_inner=n_inner))
            in_control.append(control.scores(rows, trainer))
            advance()
    return scored, in_control


def _a_fit(rows: np.ndarray, labels: Tensor, fold: Fold, trainer: Trainer) -> float:
    """Estimate the seconds per fit of one labelling in one fold, when all labellings are fitted together."""
    start = time.perf_counter()
    trainer.predict(rows, labels.cpu(), fold.train, fold.test)
    return (time.perf_counter() - start) / len(labels)


def _probabilities(scored: list[Scored], chosen: Tensor, fold: Tensor) -> Float[Tensor, "example n_class"]:
    """The predicted probabilities at the point that each example's fold chose in its inner folds."""
    logits = torch.stack([point.logits for point in scored])[chosen[fold], torch.arange(len(fold))]
    factor = torch.stack([point.factor for point in scored])[chosen[fold], fold]
    return (logits * factor[:, None]).softmax(1)


def _fold_of(folds: list[Fold], n: int) -> Int[Tensor, "example"]:
    """The fold whose test rows contain each example."""
    number = torch.empty(n, dtype=torch.long)
    for i, fold in enumerate(folds):
        number[fold.test] = i
    return number


def _final(rows: np.ndarray, label: Tensor, trainer: Trainer, scored: Scored) -> dict[str, Tensor]:
    """Weights, bias and class means fitted on all examples, scaled by the temperature of the folds."""
    y = label.cpu().numpy()
    weight, bias, step = map(torch.from_numpy, trainer.fit(rows, y))
    factor = float(scored.factor.log().mean().exp())
    means = torch.from_numpy(class_means(rows, y, trainer.n_classes))
    return {"weight": weight * factor, "bias": bias * factor, "step": step, "means": means}


def demo(model: HookedTransformer) -> ProbeStudy:
    """Is the first token's number odd? Random tokens, read at the last; works on any model, without a tokenizer."""
    return train_probe(model, odd_first(model), kind=MassMean(), null_draws=19)[1]
