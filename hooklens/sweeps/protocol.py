"""What the engine asks of a sweep, whatever is patched: sites, paths or the edges of circuits."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.measure import Reader

_AT_ONCE = 512  # tokens in one plain pass: with few, two patches take little longer than one


@dataclass
class Item:
    """One patch of one pair that has to be run: its rows begin at `start`."""

    patch: int
    pair: int
    start: int


class Patches(ABC):
    """Patches as the engine sees them: numbered, each with one value of the metric for every pair."""

    model: HookedTransformer
    tokens: Shaped[Tensor, "pair pos *d_in"]
    title: str  # what the progress bar says
    unit = "patches"
    together = False  # must the rows of all pairs of a patch walk together?
    steps = False  # are attention and the MLP of a block run by themselves?

    @abstractmethod
    def __len__(self) -> int:
        """How many patches there are."""

    @property
    @abstractmethod
    def stream(self) -> Float[Tensor, "pair pos d_model"]:
        """What leaves the last block of the run that is patched."""

    @abstractmethod
    def name_of(self, number: int) -> str:
        """The name of a patch in errors."""

    @abstractmethod
    def layer_of(self, number: int) -> int:
        """The layer at which a patch's rows begin: patches of near layers run together."""

    @abstractmethod
    def live(self, reader: Reader) -> list[Item]:
        """Every (patch, pair) that can move the metric; the value of the others is the base run's."""

    @abstractmethod
    def walk(self, reader: Reader, items: Sequence[Item]) -> list[Float[Tensor, "_pos d_model"]]:
        """The stream that leaves the last block, where the metric reads it (or from its start), for every item."""

    def checks(self, drawn: Sequence[int], n: int, reader: Reader) -> list[list[int]]:
        """Which of the patches, in the order in which they were drawn, are verified: lists that `plain` runs at once.

        n of them are asked for.
        """
        at_once = max(1, _AT_ONCE // (len(self.tokens) * self.tokens.shape[1]))
        return [list(drawn[i : min(i + at_once, n)]) for i in range(0, min(n, len(drawn)), at_once)]

    @abstractmethod
    def plain(self, numbers: Sequence[int], reader: Reader) -> Float[Tensor, "patch pair"]:
        """The metric of these patches by ordinary hooked forward passes."""

    @abstractmethod
    def fault(self, said: str, values: Float[Tensor, "patch pair"]) -> str:
        """The message where the metric is `said` (NaN or infinite), with the point where that begins."""

    def outside(self) -> list[str]:
        """What takes part in the sweep and is not the library's own, for errors."""
        block = self.model.blocks[0]
        ours = type(block).__module__.startswith("hooklens.")
        return (
            [] if ours else [f"the block kind {block.part.name!r} (its `writes_through` and the methods it overrides)"]
        )

    def loop(self) -> Sequence[int]:
        """The patches that the plain loop has to run."""
        return range(len(self))

    def rows_at_once(self, memory: int) -> int:
        """How many token positions of rows fit so many bytes."""
        return max(1, memory // row_bytes(self.model, self.stream.element_size()))

    def share(self, reader: Reader, items: Sequence[Item]) -> float:
        """The share of the plain loop's token-layers that these items compute."""
        n_pair, n_pos = self.tokens.shape[:2]
        return self.rows_of_layers(items) / max(1, len(self) * n_pair * self.model.cfg.n_layers * n_pos)

    def rows_of_layers(self, items: Sequence[Item]) -> int:
        """How many rows pass a layer, summed over the layers that each item passes."""
        n_layers, n_pos = self.model.cfg.n_layers, self.tokens.shape[1]
        return sum((n_layers - max(0, self.layer_of(item.patch))) * (n_pos - item.start) for item in items)


class Sweep(Patches):
    """All patches of a sweep, as `execute` sees them: what a file must know to go on with it."""

    @abstractmethod
    def asked(self) -> tuple[Any, Mapping[str, Any]]:
        """What identifies the sweep in a file: its grid and tokens, and by name what else is hashed, metric apart."""

    @abstractmethod
    def sketch(self) -> Sequence[Float[Tensor, "..."]]:
        """What was computed before the sweep: it is compared with that of a file, to rounding."""


def row_bytes(model: HookedTransformer, itemsize: int) -> int:
    """What one token position of one row needs at its widest: a few streams, q k v, the MLP's hidden layer."""
    cfg = model.cfg
    hidden = (3 if cfg.gated_mlp else 2) * cfg.d_mlp
    heads = 2 * (cfg.n_heads + cfg.n_key_value_heads) * cfg.d_head
    return itemsize * (4 * cfg.d_model + max(hidden, heads))
