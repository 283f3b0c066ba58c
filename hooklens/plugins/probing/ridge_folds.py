"""Ridge regression of numbers on activations: the ridge by leave-one-out, predictions out of fold, shuffled values."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.results.statistics import group_numbers

#: Ridges that are tried, as shares of the number of rows; features have variance 1.
RIDGES = tuple(10.0**power for power in range(-6, 4))
_LEAST_FREE = 1e-9  # share of a row that its own fit leaves free; at 0 leaving it out is undefined


class RidgeFit(NamedTuple):
    """The linear map of the best ridge of each target, and its mean squared error with each row left out."""

    weight: Float[Tensor, "target d"]
    bias: Float[Tensor, "target"]
    left_out: Float[Tensor, "target"]

    def predict(self, x: Float[Tensor, "row d"]) -> Float[Tensor, "row target"]:
        """The targets of rows."""
        return x @ self.weight.T + self.bias


def fit_ridge(x: Float[Tensor, "row d"], y: Float[Tensor, "row target"]) -> RidgeFit:
    """Regress each target on standardised rows, with an intercept and the ridge of `RIDGES` that leave-one-out chooses.

    One decomposition x = U S V^T serves every ridge r: the fitted values are U s U^T y with s = S^2 / (S^2 + r), and a
    row's error when it is left out is its residual over 1 - h, with h its own weight in its fitted value.

    >>> x = torch.arange(12.0, dtype=torch.float64).view(6, 2).square()
    >>> fit = fit_ridge(x, x @ torch.tensor([[2.0], [1.0]], dtype=torch.float64) + 3)
    >>> [round(float(w), 2) for w in fit.predict(x[:2] * 0)]
    [3.0, 3.0]

    References: Hoerl and Kennard (1970), "Ridge Regression", equation 2.1; Allen (1974), "The Relationship between
    Variable Selection and Data Augmentation and a Method for Prediction" (leave-one-out in closed form).
    """
    mean, spread, centre = x.mean(0), x.std(0, correction=0), y.mean(0)
    spread = torch.where(spread > spread.max() * 1e-12, spread, torch.inf)  # a constant feature is not used
    u, s, vt = torch.linalg.svd((x - mean) / spread, full_matrices=False)
    centred = y - centre
    along = u.T @ centred
    errors, kept = [], [s.square() / (s.square() + len(x) * ridge) for ridge in RIDGES]
    for shrink in kept:
        own = 1 / len(x) + u.square() @ shrink
        residual = (centred - u @ (shrink[:, None] * along)) / (1 - own).clamp_min(_LEAST_FREE)[:, None]
        errors.append(residual.square().mean(0))
    left_out, best = torch.stack(errors).min(0)
    inverse = torch.where(s > 0, 1 / s, 0.0)[:, None] * torch.stack(kept, 1)[:, best]
    weight = (vt.T @ (inverse * along) / spread[:, None]).T
    return RidgeFit(weight, centre - weight @ mean, left_out)


def deal_folds(group: Int[Tensor, "example"], folds: int, seed: int) -> Int[Tensor, "example"]:
    """The fold of each example; the groups are dealt to the folds in random order.

    >>> fold = deal_folds(torch.tensor([0, 0, 1, 2, 3]), 2, seed=0)
    >>> bool(fold[0] == fold[1]), fold.unique().tolist()
    (True, [0, 1])
    """
    number = group_numbers(len(group), group)
    return torch.randperm(int(number.max()) + 1, generator=seeded(seed))[number] % folds


def exchanged(group: Int[Tensor, "example"], generator: torch.Generator) -> Int[Tensor, "example"]:
    """An order in which the values of whole groups are exchanged with those of groups of the same size.

    >>> exchanged(torch.tensor([0, 0, 1, 1, 2]), torch.Generator().manual_seed(1)).tolist()
    [2, 3, 0, 1, 4]
    """
    number = group_numbers(len(group), group)
    members = [(number == i).nonzero().flatten() for i in range(int(number.max()) + 1)]
    order = torch.arange(len(group))
    for size in {len(rows) for rows in members}:
        alike = torch.stack([rows for rows in members if len(rows) == size])
        order[alike] = alike[torch.randperm(len(alike), generator=generator)]
    return order


def out_of_fold(
    x: Float[Tensor, "example d"], y: Float[Tensor, "example target"], fold: Int[Tensor, "example"]
) -> tuple[Float[Tensor, "example target"], Float[Tensor, "fold target"]]:
    """Predictions of each example by a fit on the other folds, and that fit's own leave-one-out error."""
    predicted, left_out = torch.empty_like(y), []
    for i in range(int(fold.max()) + 1):
        test = fold == i
        fit = fit_ridge(x[~test], y[~test])
        predicted[test] = fit.predict(x[test])
        left_out.append(fit.left_out)
    return predicted, torch.stack(left_out)


def means_out_of_fold(
    y: Float[Tensor, "example target"], fold: Int[Tensor, "example"]
) -> Float[Tensor, "example target"]:
    """The mean of the other folds, which predicts without any activation."""
    return torch.stack([y[fold != i].mean(0) for i in range(int(fold.max()) + 1)])[fold]


def explained(
    y: Float[Tensor, "*draw example target"],
    predicted: Float[Tensor, "*cell example target"],
    mean: Float[Tensor, "*draw example target"],
) -> Float[Tensor, "*cell target"]:
    """R^2 out of fold: 1 minus the squared error over that of the mean of the other folds; below 0 if it is worse.

    >>> y = torch.tensor([[0.0], [2.0]])
    >>> explained(y, torch.tensor([[0.0], [1.0]]), torch.ones(2, 1)).tolist()
    [0.5]
    """
    return 1 - (y - predicted).square().sum(-2) / (y - mean).square().sum(-2)
