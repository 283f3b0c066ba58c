"""Balanced accuracy: the accuracy within each class, averaged over classes; a constant answer scores at chance."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from hooklens.core.arguments import seeded
from hooklens.results.statistics import DRAWS, group_numbers

Ends = tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]


def balanced(right: Float[Tensor, "*cell example"], label: Int[Tensor, "*labelled example"]) -> Float[Tensor, "*cell"]:
    """Average the correctness of the examples within each class, then over the classes that occur.

    >>> balanced(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1])).item()          # always says 0
    0.5

    Reference: Brodersen et al. (2010), "The Balanced Accuracy and Its Posterior Distribution".
    """
    of_class = one_hot(label, int(label.max()) + 1 if label.numel() else 1).to(right)
    return ((right[..., None] * of_class).sum(-2) / of_class.sum(-2)).nanmean(-1)


def resampled(
    right: Float[Tensor, "*cell example"],
    label: Int[Tensor, "*labelled example"],
    group: Int[Tensor, "example"],
    *,
    least: float = 0.0,
    seed: int = 0,
) -> Float[Tensor, "draw *cell"]:
    """Balanced accuracies of bootstrap samples of whole groups; the same seed draws the same groups. NaN for one group.

    Each class gets one additional correct example (1) and one incorrect example (`least`: 0, or -1 for a difference),
    so that 64 of 64 correct is not taken as certainty.

    >>> drawn = resampled(torch.ones(2, 6), torch.tensor([0, 1] * 3), torch.arange(6))
    >>> drawn.shape, round(float(drawn.mean()), 1)                             # 4 right of 5 in each class
    (torch.Size([2000, 2]), 0.8)

    Reference: Agresti and Coull (1998), "Approximate is better than exact for interval estimation of binomial
    proportions".
    """
    number = group_numbers(right.shape[-1], group)
    n_groups, n_classes = int(number.max()) + 1, int(label.max()) + 1
    if n_groups < 2:
        return right.new_full((DRAWS, *right.shape[:-1]), float("nan"))
    added = torch.tensor([1.0, least]).repeat_interleave(n_classes).to(right)
    right = torch.cat([right, added.expand(*right.shape[:-1], -1)], -1)
    label = torch.cat([label, torch.arange(n_classes).repeat(2).expand(*label.shape[:-1], -1)], -1)
    number = torch.cat([number, torch.arange(n_groups, n_groups + len(added))])  # each of the added is a group
    n_groups += len(added)
    drawn = torch.randint(n_groups, (DRAWS, n_groups), generator=seeded(seed))
    counts = right.new_zeros(DRAWS, n_groups).scatter_add_(1, drawn, right.new_ones(drawn.shape))[:, number]
    of_class = one_hot(label).to(right).expand(*right.shape, -1)
    hits, sizes = (torch.einsum("de,...ec->d...c", counts, x) for x in (right[..., None] * of_class, of_class))
    return (hits / sizes).nanmean(-1)


def ends(drawn: Float[Tensor, "draw *cell"], folds: int, level: float = 0.95) -> Ends:
    """The 95 % interval of the draws, widened for the variance of refitting the probes; within -1 to 1.

    The draws use the fitted probes, so they contain only the variance of the test examples, s^2 / k over k folds of
    variance s^2. The folds share training examples: the variance of their mean is (1 / k + n_test / n_train) s^2,
    larger by a factor of 1 + k / (k - 1). Draws that contain no example are ignored.

    >>> low, high = ends(torch.arange(101.0) / 100, folds=5)
    >>> round(float(low), 3), round(float(high), 3)
    (-0.212, 1.0)

    Reference: Nadeau and Bengio (2003), "Inference for the Generalization Error", section 3.
    """
    at = drawn.new_tensor([(1 - level) / 2, (1 + level) / 2])
    centre, factor = drawn.nanmean(0), math.sqrt(1 + folds / (folds - 1))
    low, high = (centre + factor * (drawn.nanquantile(at, dim=0) - centre)).clamp(-1.0, 1.0)
    return low, high
