"""Balanced accuracy: how often a class is right, averaged over classes; saying the commonest earns nothing."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from hooklens.statistics import group_numbers

_DRAWS = 2000
Ends = tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]


def balanced(right: Float[Tensor, "*cell example"], label: Int[Tensor, "*labelled example"]) -> Float[Tensor, "*cell"]:
    """Right or wrong of each example, averaged within classes and then over those that there are.

    >>> balanced(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1])).item()          # always says 0
    0.5

    Reference: Brodersen et al. (2010), "The Balanced Accuracy and Its Posterior Distribution".
    """
    of_class = one_hot(label).to(right)
    return ((right[..., None] * of_class).sum(-2) / of_class.sum(-2)).nanmean(-1)


def resampled(
    right: Float[Tensor, "*cell example"],
    label: Int[Tensor, "*labelled example"],
    group: Int[Tensor, "example"],
    *,
    seed: int = 0,
) -> Float[Tensor, "draw *cell"]:
    """Balanced accuracies when whole groups are drawn again; the same seed draws the same groups. NaN for one group.

    >>> drawn = resampled(torch.ones(2, 6), torch.tensor([0, 1] * 3), torch.arange(6))
    >>> drawn.shape, bool((drawn == 1).all())
    (torch.Size([2000, 2]), True)
    """
    number = group_numbers(right.shape[-1], group)
    n = int(number.max()) + 1
    if n < 2:
        return right.new_full((_DRAWS, *right.shape[:-1]), float("nan"))
    rows = right.reshape(math.prod(right.shape[:-1]), -1)
    of_class = one_hot(label).to(right).expand(*right.shape, -1).reshape(*rows.shape, -1)
    sums, sizes = (
        right.new_zeros(len(rows), n, of_class.shape[-1]).index_add_(1, number, one)
        for one in (rows[..., None] * of_class, of_class)
    )
    drawn = torch.randint(n, (_DRAWS, n), generator=torch.Generator().manual_seed(seed))
    counts = right.new_zeros(_DRAWS, n).scatter_add_(1, drawn, right.new_ones(_DRAWS, n))
    top, bottom = (torch.einsum("dg,cgk->dck", counts, one) for one in (sums, sizes))
    return (top / bottom).nanmean(-1).view(_DRAWS, *right.shape[:-1])


def ends(drawn: Float[Tensor, "draw *cell"], level: float = 0.95) -> Ends:
    """Where the middle 95 % of draws end; draws in which no class was left count for nothing.

    >>> [float(end) for end in ends(torch.arange(101.0))]
    [2.5, 97.5]
    """
    at = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=drawn.dtype)
    low, high = drawn.nanquantile(at, dim=0)
    return low, high
