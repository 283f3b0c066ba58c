"""Folds for fitting and testing probes, and labels shuffled as they could have fallen."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import seed_number, whole
from hooklens.core.errors import InputError
from hooklens.results.statistics import group_numbers

Index = np.ndarray
Classes = Int[Tensor, "example"]
_TRIES = 20


class Fold(NamedTuple):
    """Training rows, test rows, and inner folds within the training rows."""

    train: Index
    test: Index
    inner: tuple[tuple[Index, Index], ...] = ()


def make_folds(label: Classes, group: Classes, *, folds: int = 5, inner: int = 3, seed: int = 0) -> list[Fold]:
    """Stratified folds that do not split groups, each with inner folds for choices such as that of the layer.

    >>> label, group = torch.tensor([0, 1] * 8), torch.arange(16) // 2
    >>> parts = make_folds(label, group, folds=4, inner=2)
    >>> len(parts), sorted(row for fold in parts for row in fold.test.tolist()) == list(range(16))
    (4, True)
    >>> all(not set(group[fold.train].tolist()) & set(group[fold.test].tolist()) for fold in parts)
    True

    Reference: Varma and Simon (2006), "Bias in error estimation when using cross-validation for model selection".
    """
    failures = []
    for parts in _splits(label, group, folds, seed, "the examples"):
        try:
            return [_with_inner_folds(part, label, group, inner, seed) for part in parts]
        except InputError as error:  # a class lies in too few groups of some training rows: another split may do
            failures.append(error)
    raise failures[0]


def _with_inner_folds(part: Fold, label: Classes, group: Classes, inner: int, seed: int) -> Fold:
    rows = part.train
    within = split(label[rows], group[rows], inner, seed, "the training rows of a fold")
    return part._replace(inner=tuple((rows[fold.train], rows[fold.test]) for fold in within))


def split(label: Classes, group: Classes, folds: int, seed: int, what: str = "the examples") -> list[Fold]:
    """Folds without inner folds; fewer than requested if a class occurs in fewer groups."""
    return next(_splits(label, group, folds, seed, what))


def _splits(label: Classes, group: Classes, folds: int, seed: int, what: str) -> Iterator[list[Fold]]:
    """Splits whose training rows contain every class: first the most stratified one, then random ones."""
    spread = [len(group[label == value].unique()) for value in label.unique()]
    most = min(whole("folds", folds, 2), *spread)
    if most < 2:
        raise InputError(
            f"folds need every class in at least two groups that share no prompt and no entity; in {what} the classes "
            f"occur in {spread} groups; give more prompts, or prompts that share fewer entities"
        )
    y, g = label.cpu().numpy(), group.cpu().numpy()
    usable = False
    for n_folds in range(most, 1, -1):
        for parts in (_stratified(y, g, n_folds, seed), *_dealt(g, n_folds, seed)):
            if all(len(np.unique(y[part.train])) == len(spread) and len(part.test) for part in parts):
                usable = True
                yield parts
    if not usable:
        raise InputError(
            f"no folds of {what} leave training examples of every class: one class lies almost entirely in a group of "
            f"{int(torch.bincount(group_numbers(len(group), group)).max())} examples; give smaller groups"
        )


def _stratified(y: Index, g: Index, n_folds: int, seed: int) -> list[Fold]:
    before = random.getstate()
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    random.setstate(before)  # importing it draws from the global generator
    # groups of one can be stratified exactly and fast: the other splitter takes seconds for thousands of groups
    alone = len(np.unique(g)) == len(g)
    maker, by = (StratifiedKFold, None) if alone else (StratifiedGroupKFold, g)
    splitter = maker(n_folds, shuffle=True, random_state=seed_number(seed) % 2**32)
    return [Fold(train, test) for train, test in splitter.split(y[:, None], y, by)]


def _dealt(g: Index, n_folds: int, seed: int) -> Iterator[list[Fold]]:
    """Random splits: the groups are shuffled and dealt to the folds in turn."""
    names, number = np.unique(g, return_inverse=True)
    generator = np.random.default_rng(seed_number(seed) % 2**32)
    for _ in range(_TRIES):
        fold_of = generator.permutation(len(names))[number] % n_folds
        yield [Fold(np.flatnonzero(fold_of != k), np.flatnonzero(fold_of == k)) for k in range(n_folds)]


def shuffled(label: Classes, group: Classes, generator: torch.Generator) -> Classes:
    """Labels shuffled under the null hypothesis that activations carry no information about them.

    Labels are permuted within a group of several classes; groups of one class exchange their class as a whole.
    Shuffling single examples where the label belongs to the group would make the null too narrow.

    >>> label, group = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    >>> drawn = shuffled(label, group, torch.Generator().manual_seed(0))
    >>> bool(drawn[0] == drawn[1] and drawn[2] == drawn[3]), sorted(drawn[4:].tolist())
    (True, [0, 1])
    """
    number = group_numbers(len(label), group)
    n = int(number.max()) + 1
    least = torch.full((n,), int(label.max())).scatter_reduce_(0, number, label, "amin")
    most = torch.zeros(n, dtype=label.dtype).scatter_reduce_(0, number, label, "amax")
    pure = (least == most).nonzero().flatten()
    new = least.clone()
    new[pure] = least[pure[torch.randperm(len(pure), generator=generator)]]
    drawn = torch.empty_like(label)
    # permute the labels within each mixed group: shuffle all rows, then sort stably by group
    order = torch.randperm(len(label), generator=generator)
    drawn[number.argsort(stable=True)] = label[order[number[order].argsort(stable=True)]]
    return torch.where((least == most)[number], new[number], drawn)


def shuffled_in_folds(label: Classes, group: Classes, folds: Sequence[Fold], generator: torch.Generator) -> Classes:
    """Shuffled labels, permuted among the test examples of each fold, so that the folds stay stratified.

    If labels moved between folds, the folds would contain unequal shares of the classes. A fit with an intercept then
    favours the class that is more common in its training rows, which is the rarer one in its test rows: the null would
    lie below chance. With fixed folds, everything that depends only on the rows is computed once for all draws. Where
    groups of one class differ in size, the most balanced of a few draws is used.

    >>> label, group = torch.tensor([0, 1] * 10), torch.arange(20)
    >>> folds = make_folds(label, group)
    >>> new = shuffled_in_folds(label, group, folds, torch.Generator().manual_seed(0))
    >>> [int(new[fold.test].sum()) for fold in folds], torch.equal(new, label)
    ([2, 2, 2, 2, 2], False)

    Reference: Winkler et al. (2015), "Multi-level block permutation".
    """
    new, n = label.clone(), int(label.max()) + 1
    for fold in folds:
        rows = torch.from_numpy(fold.test)
        own, least = label[rows], None
        for _ in range(_TRIES):
            drawn = shuffled(own, group[rows], generator)
            off = int((drawn.bincount(minlength=n) - own.bincount(minlength=n)).abs().sum())
            if least is None or off < least:
                least, new[rows] = off, drawn
            if not off:
                break
    return new
