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
from hooklens.plugins.probing.probes import FitsMany, ProbeKind, Weights

_NEVER = -1e9  # the logit of a class without training rows
Labellings = Int[Tensor, "labelling example"]
Logits = Float[Tensor, "labelling row n_class"]


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


@dataclass(frozen=True)
class Trainer:
    """Fits a kind of probe for a number of classes, and predicts rows that it was not fitted on."""

    kind: ProbeKind
    n_classes: int

    def fit(self, x: np.ndarray, y: np.ndarray) -> Weights:
        """Fit a probe; it never predicts a class without training rows."""
        there = np.unique(y)
        if len(there) == self.n_classes:
            return self.kind.fit(x, y, self.n_classes)
        empty = np.zeros((self.n_classes, x.shape[1]))
        weights = Weights(empty, np.full(self.n_classes, _NEVER), empty.copy())
        weights.bias[there] = 0.0
        if len(there) > 1:
            for of_all, of_these in zip(weights, self.kind.fit(x, np.searchsorted(there, y), len(there)), strict=True):
                of_all[there] = of_these
        return weights

    def predict(self, x: np.ndarray, labels: Labellings, train: Index, test: Index) -> Logits:
        """The logits of the test rows after a fit on the training rows, one labelling at a time or all at once."""
        known = labels[:, train]
        if not isinstance(self.kind, FitsMany):
            return torch.from_numpy(np.stack([self.fit(x[train], y.numpy()).logits(x[test]) for y in known]))
        logits = self.kind.said_of_many(x[train], known, x[test], self.n_classes)
        lacks = torch.stack([(known != i).all(1) for i in range(self.n_classes)], 1)
        return logits.masked_fill(lacks[:, None], _NEVER)

    def out_of_fold(self, x: np.ndarray, labels: Labellings, folds: Sequence[Fold]) -> Logits:
        """The out-of-fold logits of each labelling; 0 for examples that are in no test fold."""
        labels = labels.cpu()
        logits = torch.zeros(*labels.shape, self.n_classes, dtype=torch.float64)
        for fold in folds:
            logits[:, fold.test] = self.predict(x, labels, fold.train, fold.test)
        return logits

    def correct(self, x: np.ndarray, labels: Labellings, folds: Sequence[Fold]) -> Float[Tensor, "labelling example"]:
        """1 where the out-of-fold prediction is correct, 0 elsewhere."""
        return (self.out_of_fold(x, labels, folds).argmax(2) == labels.cpu()).double()

    def cross_validate(self, x: np.ndarray, labels: Labellings, folds: Sequence[Fold], *, n_inner: int = 1) -> Scored:
        """Predict all examples out of fold; for the first `n_inner` labellings also in the inner folds.

        >>> from hooklens.plugins.probing.folds import make_folds
        >>> from hooklens.plugins.probing.probes import MassMean
        >>> label = torch.tensor([0, 1] * 10); x = np.stack([label * 2.0, np.ones(20)], 1)
        >>> scored = Trainer(MassMean(), 2).cross_validate(x, label[None], make_folds(label, torch.arange(20)))
        >>> bool((scored.logits.argmax(1) == label).all()), scored.inner.tolist()
        (True, [[1.0, 1.0, 1.0, 1.0, 1.0]])
        """
        labels = labels.cpu()
        logits, inner, factor = self.out_of_fold(x, labels, folds), [], []
        for fold in folds:
            within = torch.cat([self.predict(x, labels[:n_inner], *part) for part in fold.inner], 1)
            truth = labels[:n_inner, np.concatenate([test for _, test in fold.inner])]
            inner.append(balanced((within.argmax(2) == truth).double(), truth))
            factor.append(temperature(within[0], truth[0]))
        factors = torch.tensor(factor, dtype=torch.float64)
        return Scored(logits[0], logits.argmax(2) == labels, inner=torch.stack(inner, 1), factor=factors)


def majority(label: Int[Tensor, "example"], folds: Sequence[Fold]) -> Float[Tensor, "example"]:
    """1 where the most common class of the training rows is correct, 0 elsewhere."""
    right = torch.zeros(len(label), dtype=torch.float64)
    for fold in folds:
        right[fold.test] = (label[fold.test] == label[fold.train].bincount().argmax()).double()
    return right


def as_rows(x: Float[Tensor, "example d"]) -> np.ndarray:
    """Convert rows to the dtype that scikit-learn computes in."""
    return x.cpu().numpy().astype(np.float64)
