"""Linear probes at every layer, the layer chosen in inner folds, with the controls that an accuracy needs."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.names import Where
from hooklens.data.prompts import Prompts
from hooklens.plugins.probing.folds import Fold, control_labels, control_types, make_folds, shuffled, split
from hooklens.plugins.probing.gather import Activations, gather
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.probes import Logistic, MassMean, Probe, ProbeKind
from hooklens.plugins.probing.scoring import Scored, as_rows, correct, cross_validate, fit, majority, means_of
from hooklens.plugins.probing.study import ProbeStudy
from hooklens.plugins.probing.task import Label, ProbeTask, read_task
from hooklens.progress import progress

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_CONTROLS = 2  # control tasks a point: their mean over examples is what is shown
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
    entity; standardisation and fit see a fold's own training examples; the point is chosen by the accuracy in inner
    folds, and the accuracy there is what is reported. `folder` keeps the activations on disk: see `gather`.

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
    generator = torch.Generator().manual_seed(seed)
    control = _Control.of(acts, task, n, generator, seed)
    draws = [shuffled(label, acts.group, generator) for _ in range(max(null_draws, 1))]
    scored: list[Scored] = []
    beside: dict[str, list[Tensor]] = {"control": [], "shuffled": []}
    with progress("probing", len(acts.points), unit="points") as advance:
        for x in acts.x:
            scored.append(cross_validate(x, label, n, folds, kind))
            rows = as_rows(x)
            beside["control"].append(control.accuracy(rows, n, kind))
            beside["shuffled"].append(correct(rows, draws[0], n, folds, kind))
            advance()
    chosen = torch.stack([one.inner for one in scored]).argmax(0)  # the first of those that tie
    right = torch.stack([(one.logits.argmax(1) == label).double() for one in scored])
    best = int(right.mean(1).argmax())
    numbers = _nested(scored, right, chosen, folds) | {name: torch.stack(each) for name, each in beside.items()}
    numbers |= {"correct": right, "majority": majority(label, folds)}
    numbers |= {"null": _null(acts, draws[:null_draws], n, folds, chosen, kind)}
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
        control_by=control.by,
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


@dataclass(frozen=True)
class _Control:
    """Control tasks of one study: random labels of types, and folds in which a type stands on both sides."""

    by: str | None
    labels: list[Int[Tensor, "example"]]
    folds: list[list[Fold]]

    @classmethod
    def of(cls, acts: Activations, task: ProbeTask, n: int, generator: torch.Generator, seed: int) -> "_Control":
        text = task.text_numbers()
        found = control_types(acts.token, text, acts.group)
        if found is None:
            return cls(None, [], [])
        types, by = found
        shares = (torch.bincount(task.label, minlength=n) / len(task)).tolist()
        labels = [control_labels(types, shares, generator) for _ in range(_CONTROLS)]
        # prompts that are the same would make remembering a type remembering a row: they stay together
        folds = [[Fold(a, b, ()) for a, b in split(one, text, 5, seed)] for one in labels]
        return cls(by, labels, folds)

    def accuracy(self, x: Any, n: int, kind: ProbeKind) -> Float[Tensor, "example"]:
        if self.by is None:
            return torch.full((len(x),), float("nan"), dtype=torch.float64)
        each = [correct(x, label, n, folds, kind) for label, folds in zip(self.labels, self.folds, strict=True)]
        return torch.stack(each).mean(0)


def _null(
    acts: Activations, draws: list[Tensor], n: int, folds: list[Fold], chosen: Tensor, kind: ProbeKind
) -> Float[Tensor, "draw"]:
    """The nested accuracy of labels that could have been, at the points that the real ones chose.

    Whichever point is taken without looking at the test examples, their accuracy under such labels is that of chance;
    choosing anew in every draw would cost a whole study each.
    """
    right = torch.zeros(len(draws), dtype=torch.float64)
    with progress("shuffled labels", len(folds) * len(draws), unit="fits") as advance:
        for fold, point in zip(folds, chosen.tolist(), strict=True):
            x = as_rows(acts.x[point])
            for i, label in enumerate(draws):
                test = correct(x, label, n, [fold], kind)[torch.from_numpy(fold.test)]
                right[i] += test.sum()
                advance()
    return right / len(acts)


def _final(x: Float[Tensor, "example d"], label: Tensor, n: int, kind: ProbeKind, scored: Scored) -> dict[str, Tensor]:
    """Weights, bias and class means on every example, scaled by the temperature of the folds."""
    rows = as_rows(x)
    weight, bias, step = map(torch.from_numpy, fit(kind, rows, label.numpy(), n))
    factor = float(scored.factor.log().mean().exp())
    return {"weight": weight * factor, "bias": bias * factor, "step": step, "means": means_of(rows, label, n)}


def demo(model: "HookedTransformer") -> ProbeStudy:
    """Is the first token's number odd? Random tokens, read at the last; any model, no tokenizer needed."""
    return train_probe(model, odd_first(model), kind=MassMean(), null_draws=19)[1]
