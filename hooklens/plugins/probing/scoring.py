"""Out-of-fold predictions: a probe is fitted on some examples and predicts others, one point after another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.plugins.probing.balancing import balanced
from hooklens.plugins.probing.confidence import temperature
from hooklens.plugins.probing.folds import Fold, Index
from hooklens.plugins.probing.many import FitsMany
from hooklens.plugins.probing.probes import ProbeKind, Weights, class_means
from hooklens.plugins.probing.task import most_common

_NEVER = -1e9  # the logit of a class without training rows


@dataclass(frozen=True)
class Scored:
    """The predictions of one point's probes for examples that they were not fitted on.

    Labels come in several labellings, the real ones first: `logits` belong to the real labels, `right` to all. `inner`
    is the balanced accuracy in each fold's inner folds, which may be used to choose a point. `factor` is the
    temperature fitted there, so probabilities are not tuned on the examples that judge them.
    """

    logits: Float[Tensor, "example n_class"]
    right: Bool[Tensor, "labelling example"]
    inner: Float[Tensor, "chosen_labelling fold"]
    factor: Float[Tensor, "fold"]


def cross_validate(
    x: Float[Tensor, "example d"],
    labels: Int[Tensor, "labelling example"],
    n_classes: int,
    folds: Sequence[Fold],
    kind: ProbeKind,
    *,
    n_inner: int = 1,
) -> Scored:
    """Fit on each fold's training rows and predict the test rows; for `n_inner` labellings also in the inner folds.

    >>> from hooklens.plugins.probing.folds import make_folds
    >>> from hooklens.plugins.probing.probes import MassMean
    >>> label = torch.tensor([0, 1] * 10); x = torch.stack([label * 2.0, torch.ones(20)], 1)
    >>> scored = cross_validate(x, label[None], 2, make_folds(label, torch.arange(20)), MassMean())
    >>> bool((scored.logits.argmax(1) == label).all()), scored.inner.tolist()
    (True, [[1.0, 1.0, 1.0, 1.0, 1.0]])
    """
    rows, labels = as_rows(x), labels.cpu()
    logits = predicted(rows, labels, n_classes, folds, kind)
    inner, factor = [], []
    for fold in folds:
        parts = [
            asked(kind, rows, labels=labels[:n_inner], train=a, test=b, n_classes=n_classes) for a, b in fold.inner
        ]
        within, tested = torch.cat(parts, 1), torch.from_numpy(np.concatenate([b for _, b in fold.inner]))
        truth = labels[:n_inner, tested]
        inner.append(balanced((within.argmax(2) == truth).double(), truth))
        factor.append(temperature(within[0], truth[0]))
    return Scored(
        logits[0], logits.argmax(2) == labels, torch.stack(inner, 1), torch.tensor(factor, dtype=torch.float64)
    )


def predicted(
    x: np.ndarray, labels: Int[Tensor, "labelling example"], n_classes: int, folds: Sequence[Fold], kind: ProbeKind
) -> Float[Tensor, "labelling example n_class"]:
    """The out-of-fold logits of each labelling; 0 for examples that are in no test fold."""
    labels = labels.cpu()
    logits = torch.zeros(*labels.shape, n_classes, dtype=torch.float64)
    for fold in folds:
        logits[:, torch.from_numpy(fold.test)] = asked(
            kind, x, labels=labels, train=fold.train, test=fold.test, n_classes=n_classes
        )
    return logits


def asked(
    kind: ProbeKind, x: np.ndarray, labels: Int[Tensor, "labelling example"], train: Index, test: Index, n_classes: int
) -> Float[Tensor, "labelling test n_class"]:
    """Fit on the training rows and predict the test rows, one labelling at a time or all at once."""
    known = labels[:, torch.from_numpy(train)]
    if not isinstance(kind, FitsMany):
        each = [said(x[test], fit(kind, x[train], label.numpy(), n_classes)) for label in known]
        return torch.from_numpy(np.stack(each))
    logits = kind.said_of_many(x[train], known, x[test], n_classes)
    lacks = torch.stack([(known != one).all(1) for one in range(n_classes)], 1)
    return logits.masked_fill(lacks[:, None], _NEVER)


def correct(
    x: np.ndarray, label: Int[Tensor, "example"], n_classes: int, folds: Sequence[Fold], kind: ProbeKind
) -> Float[Tensor, "example"]:
    """1 where the out-of-fold prediction is correct, 0 elsewhere."""
    return (predicted(x, label[None], n_classes, folds, kind)[0].argmax(1) == label.cpu()).double()


def majority(label: Int[Tensor, "example"], folds: Sequence[Fold]) -> Float[Tensor, "example"]:
    """1 where the most common class of the training rows is correct, 0 elsewhere."""
    right = torch.zeros(len(label), dtype=torch.float64)
    for fold in folds:
        test = torch.from_numpy(fold.test)
        right[test] = (label[test] == most_common(label[torch.from_numpy(fold.train)])).double()
    return right


def fit(kind: ProbeKind, x: np.ndarray, y: np.ndarray, n_classes: int) -> Weights:
    """Fit a probe; it never predicts a class without training rows."""
    there = np.unique(y)
    if len(there) == n_classes:
        return kind.fit(x, y, n_classes)
    empty = np.zeros((n_classes, x.shape[1]))
    filled = Weights(empty, np.full(n_classes, _NEVER), empty.copy())
    filled.bias[there] = 0.0
    if len(there) > 1:
        for all_classes, of_those in zip(filled, kind.fit(x, np.searchsorted(there, y), len(there)), strict=True):
            all_classes[there] = of_those
    return filled


def said(x: np.ndarray, weights: Weights) -> np.ndarray:
    """The logits of rows."""
    return x @ weights.weight.T + weights.bias


def as_rows(x: Float[Tensor, "example d"]) -> np.ndarray:
    """Convert rows to the dtype that scikit-learn computes in."""
    return x.cpu().numpy().astype(np.float64)


def means_of(x: np.ndarray, label: Int[Tensor, "example"], n_classes: int) -> Float[Tensor, "n_class d"]:
    """The class means of all rows."""
    return torch.from_numpy(class_means(x, label.cpu().numpy(), n_classes))
