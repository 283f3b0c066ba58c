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
from hooklens.plugins.probing.probes import ProbeKind, Weights

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
        within = torch.cat(
            [fit_and_predict(kind, rows, labels[:n_inner], part, n_classes=n_classes) for part in fold.inner], 1
        )
        truth = labels[:n_inner, np.concatenate([test for _, test in fold.inner])]
        inner.append(balanced((within.argmax(2) == truth).double(), truth))
        factor.append(temperature(within[0], truth[0]))
    right, factors = logits.argmax(2) == labels, torch.tensor(factor, dtype=torch.float64)
    return Scored(logits[0], right, inner=torch.stack(inner, 1), factor=factors)


def predicted(
    x: np.ndarray, labels: Int[Tensor, "labelling example"], n_classes: int, folds: Sequence[Fold], kind: ProbeKind
) -> Float[Tensor, "labelling example n_class"]:
    """The out-of-fold logits of each labelling; 0 for examples that are in no test fold."""
    labels = labels.cpu()
    logits = torch.zeros(*labels.shape, n_classes, dtype=torch.float64)
    for fold in folds:
        logits[:, fold.test] = fit_and_predict(kind, x, labels, fold[:2], n_classes=n_classes)
    return logits


def fit_and_predict(
    kind: ProbeKind,
    x: np.ndarray,
    labels: Int[Tensor, "labelling example"],
    part: tuple[Index, Index],
    *,
    n_classes: int,
) -> Float[Tensor, "labelling test n_class"]:
    """Fit on the first rows of `part` and predict the second ones, one labelling at a time or all at once."""
    train, test = part
    known = labels[:, train]
    if not isinstance(kind, FitsMany):
        probes = [fit(kind, x[train], label.numpy(), n_classes) for label in known]
        return torch.from_numpy(np.stack([probe.logits(x[test]) for probe in probes]))
    logits = kind.said_of_many(x[train], known, x[test], n_classes)
    lacks = torch.stack([(known != i).all(1) for i in range(n_classes)], 1)
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
        right[fold.test] = (label[fold.test] == label[fold.train].bincount().argmax()).double()
    return right


def fit(kind: ProbeKind, x: np.ndarray, y: np.ndarray, n_classes: int) -> Weights:
    """Fit a probe; it never predicts a class without training rows."""
    there = np.unique(y)
    if len(there) == n_classes:
        return kind.fit(x, y, n_classes)
    empty = np.zeros((n_classes, x.shape[1]))
    weights = Weights(empty, np.full(n_classes, _NEVER), empty.copy())
    weights.bias[there] = 0.0
    if len(there) > 1:
        for of_all, of_these in zip(weights, kind.fit(x, np.searchsorted(there, y), len(there)), strict=True):
            of_all[there] = of_these
    return weights


def as_rows(x: Float[Tensor, "example d"]) -> np.ndarray:
    """Convert rows to the dtype that scikit-learn computes in."""
    return x.cpu().numpy().astype(np.float64)
