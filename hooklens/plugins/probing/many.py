"""Probes of many labellings of the same rows: computations that depend only on the rows are shared."""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

_TINY = 1e-10  # directions with a smaller share of the largest variance are rounding error
_TOLERANCE = 1e-5  # largest remaining change of the logits, for rows of typical norm
_STEPS = 1000

Rows = Float[Tensor, "train r"]
Labels = Int[Tensor, "draw train"]
Logits = Float[Tensor, "draw test n_class"]


@runtime_checkable
class FitsMany(Protocol):
    """A kind of probe that predicts for many labellings at once, faster than one fit at a time."""

    def said_of_many(self, x: np.ndarray, labels: Labels, asked: np.ndarray, n_classes: int) -> Logits: ...


def principal(x: np.ndarray, asked: np.ndarray) -> tuple[Rows, Float[Tensor, "test r"], Float[Tensor, "r"]]:
    """Standardise rows, and scale others alike; return both in the coordinates of the principal directions.

    >>> rows, other, size = principal(np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([[4.0, 1.0]]))
    >>> rows.abs().flatten().tolist(), other.abs().flatten().tolist(), size.tolist()
    ([1.0, 1.0], [3.0], [2.0])

    A penalty on the norm of the weights is unchanged in these coordinates, and there are at most as many as rows.
    `size` is the sum of squares along each.
    """
    spread = x.std(0)
    spread[spread <= 10 * np.finfo(np.float64).eps * np.abs(x).max(0, initial=0.0)] = 1.0  # as StandardScaler does
    rows, other = (torch.from_numpy((part - x.mean(0)) / spread) for part in (x, asked))
    wide = rows.shape[0] < rows.shape[1]
    size, basis = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = size > _TINY * size[-1:].clamp_min(_TINY)
    size, basis = size[kept], basis[:, kept]
    if wide:
        return basis * size.sqrt(), other @ (rows.T @ (basis / size.sqrt())), size
    return rows @ basis, other @ basis, size


def logistic_logits(x: np.ndarray, labels: Labels, asked: np.ndarray, n_classes: int, c: float) -> Logits:
    """Predictions of logistic regression with an L2 penalty, optimised for all labellings together.

    In principal coordinates the Hessian of the loss is bounded by a diagonal that does not depend on the labels (a
    quarter of the sum of squares, half for several classes). Accelerated steps preconditioned by this diagonal need no
    line search and no factorisation.

    Reference: Böhning and Lindsay (1988), "Monotonicity of quadratic-approximation algorithms"; O'Donoghue and Candès
    (2015), "Adaptive restart for accelerated gradient schemes".
    """
    rows, other, size = principal(x, asked)
    target = one_column(labels, n_classes).permute(1, 0, 2)  # train draw column
    n, bound = len(rows), 0.25 if n_classes == 2 else 0.5
    # the intercept, a column of ones orthogonal to the others, is not penalised
    rows, other = (torch.cat([part, part.new_ones(len(part), 1)], 1) for part in (rows, other))
    penalty = torch.cat([size.new_full((len(size),), 1 / c), size.new_zeros(1)])[:, None]
    curvature = penalty + bound * torch.cat([size, size.new_tensor([float(n)])])[:, None]
    weight = ahead = rows.new_zeros(rows.shape[1], target[0].numel())
    momentum = rows.new_ones(weight.shape[1])
    # the penalty bounds the curvature from below: a gradient g leaves a weight at most c g from its optimum
    moves = torch.cat([c * (size / n).sqrt(), size.new_tensor([1 / n])])[:, None]
    for step in range(_STEPS):
        logits = (rows @ ahead).view_as(target)
        prob = logits.sigmoid() if n_classes == 2 else logits.softmax(2)
        gradient = rows.T @ (prob - target).flatten(1) + penalty * ahead
        if step % 5 == 4 and float((gradient.abs() * moves).max()) <= _TOLERANCE:
            break
        new = ahead - gradient / curvature
        moved = new - weight
        uphill = (gradient * moved).sum(0) > 0  # restart the labellings that overshot
        following = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        ahead = new + torch.where(uphill, 0.0, (momentum - 1) / following) * moved
        weight, momentum = new, following
    return column_per_class((other @ ahead).view(len(other), *target.shape[1:]).transpose(0, 1))


def one_column(labels: Labels, n_classes: int) -> Float[Tensor, "draw train column"]:
    """Indicator of the class: one column for two classes, as in scikit-learn, else one column per class."""
    return labels[..., None].double() if n_classes == 2 else one_hot(labels, n_classes).double()


def column_per_class(margin: Float[Tensor, "draw test column"]) -> Logits:
    """Logits from indicator columns: half the margin for and against, if there is a single column."""
    return torch.cat([-margin, margin], 2) / 2 if margin.shape[2] == 1 else margin
