"""Are two ways of computing the same numbers equal but for rounding, on any processor?"""

import torch
from torch import Tensor


def close(got: Tensor, expected: Tensor, ulps: float = 100, equal_nan: bool = False) -> bool:
    """Within `ulps` roundings of the largest expected value: sums are taken in another order by every kernel."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    finite = expected.detach().abs()[expected.isfinite()]
    largest = float(finite.max()) if len(finite) else 0.0
    bound = ulps * torch.finfo(expected.dtype).eps * largest
    return torch.allclose(got, expected, rtol=0, atol=bound, equal_nan=equal_nan)
