"""The control for a rank: the rank of the same answer in the streams of other positions at the same layer."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.plugins.lens.reading import Reading

DRAWS = 4  # number of other positions in which each answer is ranked


def shifts_round(n: int) -> list[int]:
    """Up to `DRAWS` distinct cyclic shifts of n rows, none of them 0."""
    many = min(DRAWS, n - 1)
    return [1 + i * (n - 1) // many for i in range(many)]


def elsewhere(
    reading: Reading, answer: Int[Tensor, "row"], shifts: list[int], *, one_for_all: bool
) -> Float[Tensor, "draw layer row"]:
    """What rank each row's answer has in the rows at these distances; NaN where those have the same answer.

    With `one_for_all` the answer was given for all rows alike, so that having it says nothing of a row.
    """
    found = torch.full((DRAWS, *reading.kl.shape), float("nan"), dtype=reading.kl.dtype, device=answer.device)
    for draw, shift in enumerate(shifts):
        ranks = reading.rank[..., 1 + draw].roll(-shift, 1).to(found)
        found[draw] = ranks if one_for_all else ranks.where(answer.roll(-shift) != answer, float("nan"))
    return found
