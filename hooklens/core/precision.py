"""What must not be computed in half precision: sums, softmax, norms."""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """The same numbers in float32 or wider: half precision has 8 to 11 bits, too few to add up.

    >>> widened(torch.zeros(2, dtype=torch.bfloat16)).dtype, widened(torch.zeros(2, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
