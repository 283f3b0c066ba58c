"""Many edits of the same prompts at once: rows of one batch, started at the first layer that is edited."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.hooks import HookFn
from hooklens.core.names import Where
from hooklens.core.progress_bar import Advance
from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import why_plain
from hooklens.sweeps.protocol import row_bytes
from hooklens.sweeps.settings import current

Hooks = list[tuple[Where, HookFn]]
Index = Int[Tensor, "row"]
_POSITIONS = 2048  # of one batch: products are efficient from there on


@dataclass(frozen=True)
class Edits:
    """`n` edits of a model: `hooks(index)` gives the hooks of a batch whose row i is edited as edit index[i]."""

    n: int
    hooks: Callable[[Index], Hooks]
    first_layer: int

    def streams(
        self, model: HookedTransformer, tokens: Int[Tensor, "prompt pos"], advance: Advance
    ) -> Iterator[Float[Tensor, "edit prompt pos d_model"]]:
        """The stream that leaves the last block under every edit, as many edits at a time as memory allows."""
        base, n_layers = model(tokens, stop_at_layer=self.first_layer), model.cfg.n_layers
        positions = min(_POSITIONS, current().memory // row_bytes(model, base.element_size()))
        for index in torch.arange(self.n).split(max(1, positions // tokens.numel())):
            with model.hooks(self.hooks(index.repeat_interleave(len(base)))):
                rows = base.repeat(len(index), 1, 1)
                out = model(rows, start_at_layer=self.first_layer, stop_at_layer=n_layers)
            yield out.unflatten(0, (len(index), -1))
            advance(len(index) * len(base))

    def values(
        self, model: HookedTransformer, tokens: Int[Tensor, "prompt pos"], metric: Any, advance: Advance
    ) -> Float[Tensor, "edit prompt"]:
        """The metric of every prompt under every edit."""
        whole = why_plain(model) is not None
        streams = (stream for some in self.streams(model, tokens, advance) for stream in some)
        return torch.stack([Reader(model, metric, stream, whole=whole).base for stream in streams])


def by_edit(index: Index, edits: Sequence[Callable[[Index], Hooks]]) -> Hooks:
    """The hooks of a batch in which every edit has hooks of its own, for its rows."""
    return [hook for number in index.unique().tolist() for hook in edits[number]((index == number).nonzero().flatten())]
