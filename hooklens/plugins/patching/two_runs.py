"""The two runs that a patched one is read between."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor


class TwoRuns:
    """What results of patching share: the metric of the clean and of the corrupted run, pair by pair and on average."""

    baselines: ClassVar[tuple[str, ...]] = ("clean", "corrupted")
    clean_per_pair: Float[Tensor, "pair"]
    corrupted_per_pair: Float[Tensor, "pair"]

    @property
    def clean(self) -> float:
        """The metric of the clean run, mean over pairs."""
        return float(self.clean_per_pair.mean())

    @property
    def corrupted(self) -> float:
        """The metric of the corrupted run, mean over pairs."""
        return float(self.corrupted_per_pair.mean())
