"""Foldings: pure functions from a model to a model with the same log-probabilities."""

from hooklens.core.errors import did_you_mean

FOLDS = {}


def fold_all(model, names):
    for name in names:
        if name not in FOLDS:
            raise did_you_mean("folding", name, FOLDS)
        model = FOLDS[name](model)
    return model
