"""How the engine computed the values of a result, and how closely they were checked."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

_PRODUCTS = {"linear": "torch's own products", "packed": "weights packed for this CPU"}


@dataclass(frozen=True, eq=False, kw_only=True)
class RunAccount:
    """The base of every result of the engine: what was computed, with what, and how it was checked.

    `computed` is the share of the plain loop's token-layers that were computed. `largest_error` is the largest
    difference between the `n_verified` patches that were run both ways, NaN if none was. `how` is "engine", or "plain
    loop" with the reason. `kernel` is what linear layers multiplied with, "linear" or "packed".
    """

    computed: float
    largest_error: float
    n_verified: int
    how: str
    kernel: str = ""

    @classmethod
    def joined(cls, parts: "Sequence[RunAccount]", sizes: Sequence[int] | None = None) -> "RunAccount":
        """The account of several runs; `computed` is their mean, weighted by `sizes`."""
        sizes = [1] * len(parts) if sizes is None else sizes
        errors = [part.largest_error for part in parts if part.n_verified] or [part.largest_error for part in parts]
        return RunAccount(
            computed=sum(part.computed * n for part, n in zip(parts, sizes, strict=True)) / sum(sizes),
            largest_error=float(torch.tensor(errors, dtype=torch.float64).max()),
            n_verified=sum(part.n_verified for part in parts),
            how=" and ".join(dict.fromkeys(part.how for part in parts)),
            kernel=" and ".join(dict.fromkeys(part.kernel for part in parts)),
        )

    @property
    def account(self) -> dict[str, Any]:
        """How the values were computed, as fields of another result."""
        return {field.name: getattr(self, field.name) for field in fields(RunAccount)}

    @property
    def exactness(self) -> str:
        """How many patches were checked and with what linear layers were multiplied, as sentences."""
        largest = (
            "" if self.largest_error != self.largest_error else f"; the largest difference was {self.largest_error:.1e}"
        )
        checked = f"{self.n_verified} were run again as plain hooked forward passes{largest}."
        products = [_PRODUCTS[name] for name in sorted(self.kernel.split(" and ")) if name in _PRODUCTS]
        if not products:
            return checked
        return (
            f"{checked} Linear layers were multiplied with {' and '.join(products)}. The other kernel gives other last "
            "digits, and each process measures which is faster; in Python, hl.engine(kernel=...) fixes the choice."
        )
