"""Wider dtypes for sums, softmax and norms, which half precision cannot represent well enough."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """The same numbers in float32 or wider: half precision has 8 to 11 bits, too few to add up.

    >>> widened(torch.zeros(2, dtype=torch.bfloat16)).dtype, widened(torch.zeros(2, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_wide_as(x: Tensor) -> AbstractContextManager[None]:
    """A `with` block in which products have the dtype of their factors, also where torch.autocast would halve it.

    >>> x = torch.ones(2, 2)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     with as_wide_as(x):
    ...         (x @ x).dtype
    torch.float32
    """
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x.device) else nullcontext()


def is_autocast(device: torch.device) -> bool:
    """Whether torch.autocast is on for a device; torch's own function raises for devices without it, such as meta.

    >>> is_autocast(torch.device("meta"))
    False
    """
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
