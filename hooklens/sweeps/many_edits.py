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
from hooklens.sweeps.execution import run
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import drops_out, why_plain
from hooklens.sweeps.protocol import Item, Patches, row_bytes
from hooklens.sweeps.settings import current

Hooks = list[tuple[Where, HookFn]]
Index = Int[Tensor, "row"]
Streams = Float[Tensor, "edit prompt pos d_model"]
_POSITIONS = 2048  # of one batch: products are efficient from there on


@dataclass(frozen=True)
class Edits:
    """`n` edits of a model: `hooks(index)` gives the hooks of a batch whose row i is edited as edit index[i]."""

    n: int
    hooks: Callable[[Index], Hooks]
    first_layer: int

    def streams(
        self, model: HookedTransformer, tokens: Int[Tensor, "prompt pos"], advance: Advance
    ) -> Iterator[Streams]:
        """The stream that leaves the last block under every edit, as many edits at a time as memory allows."""
        patches = EditPatches(model, tokens, self)
        for index in torch.arange(self.n).split(max(1, patches.rows_at_once(current().memory) // tokens.numel())):
            yield patches.edited(index)
            advance(len(index) * len(tokens))

    @torch.no_grad()
    def values(
        self, model: HookedTransformer, tokens: Int[Tensor, "prompt pos"], metric: Any, advance: Advance
    ) -> Float[Tensor, "edit prompt"]:
        """The metric of every prompt under every edit; a few edits are run again one by one."""
        patches, reason = EditPatches(model, tokens, self), why_plain(model)
        reader = Reader(model, metric, patches.stream, whole=reason is not None)
        values = reader.base.repeat(self.n, 1)
        reason = reason if drops_out(model) else None  # edits are hooks, beside which those of others may stand
        return run(patches, reader, values, reason=reason, advance=lambda n=1: advance(n * len(tokens))).values


class EditPatches(Patches):
    """Edits as the engine runs them: all prompts of an edit together, from the first layer that is edited."""

    title, unit, together = "edits", "edits", True

    def __init__(self, model: HookedTransformer, tokens: Int[Tensor, "prompt pos"], edits: Edits):
        self.model, self.tokens, self.edits = model, tokens, edits
        self.entering = model(tokens, stop_at_layer=edits.first_layer)
        self.unedited: Float[Tensor, "prompt pos d_model"] | None = None

    def __len__(self) -> int:
        return self.edits.n

    @property
    def stream(self) -> Float[Tensor, "prompt pos d_model"]:
        if self.unedited is None:
            first, last = self.edits.first_layer, self.model.cfg.n_layers
            self.unedited = self.model(self.entering, start_at_layer=first, stop_at_layer=last)
        return self.unedited

    def name_of(self, number: int) -> str:
        return f"edit {number}"

    def layer_of(self, number: int) -> int:
        return self.edits.first_layer

    def rows_at_once(self, memory: int) -> int:
        return max(1, min(_POSITIONS, memory // row_bytes(self.model, self.entering.element_size())))

    def live(self, reader: Reader) -> list[Item]:
        return [Item(number, prompt, 0) for number in range(len(self)) for prompt in range(len(self.tokens))]

    def edited(self, index: Int[Tensor, "edit"]) -> Streams:
        """The stream that leaves the last block under each of these edits."""
        n = len(self.tokens)
        with self.model.hooks(self.edits.hooks(index.repeat_interleave(n))):
            rows = self.entering.repeat(len(index), 1, 1)
            out = self.model(rows, start_at_layer=self.edits.first_layer, stop_at_layer=self.model.cfg.n_layers)
        return out.unflatten(0, (len(index), n))

    def walk(self, reader: Reader, items: Sequence[Item]) -> list[Float[Tensor, "_pos d_model"]]:
        # items are all prompts of one edit after another
        streams = self.edited(torch.tensor([item.patch for item in items[:: len(self.tokens)]]))
        if reader.read is None:
            return list(streams.flatten(0, 1))
        prompt = torch.arange(len(self.tokens), device=streams.device)[:, None]
        return list(streams[:, prompt, reader.read].flatten(0, 1))

    def plain(self, numbers: Sequence[int], reader: Reader) -> Float[Tensor, "edit prompt"]:
        indices = [torch.full((len(self.tokens),), number) for number in numbers]
        return torch.cat([reader.under_hooks(self.tokens, self.edits.hooks(index)) for index in indices])

    def fault(self, said: str, values: Float[Tensor, "edit prompt"]) -> str:
        return f"the metric is {said} under an edit, though it is finite without; choose a smaller one"


def by_edit(index: Index, edits: Sequence[Callable[[Index], Hooks]]) -> Hooks:
    """The hooks of a batch in which every edit has hooks of its own, for its rows."""
    return [hook for number in index.unique().tolist() for hook in edits[number]((index == number).nonzero().flatten())]
