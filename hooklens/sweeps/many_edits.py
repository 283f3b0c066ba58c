"""Many edits of the same prompts at once: rows of one batch, started where the first of them begins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.hooks import HookFn
from hooklens.core.names import Where
from hooklens.core.progress_bar import progress
from hooklens.model.kv_cache import KVCache
from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.execution import Outcome, begun, run_parts
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import drops_out, not_finite, why_plain
from hooklens.sweeps.protocol import Item, Sweep, row_bytes
from hooklens.sweeps.resume import Resume, products_of

Hooks = list[tuple[Where, HookFn]]
Index = Int[Tensor, "row"]
_POSITIONS = 2048  # of one batch: products are efficient from there on


@dataclass(frozen=True)
class Edits:
    """`n` edits of a model, of which none edits a layer before `first_layer`, or a position before `start`.

    `hooks(index)` gives the hooks of a batch whose row i is edited as edit index[i]: all prompts of one edit after
    another. `asked` identifies them in a file and `sketch` is compared with it to rounding, as in `Sweep`.
    """

    n: int
    hooks: Callable[[Index], Hooks]
    first_layer: int
    asked: tuple[Any, Mapping[str, Any]] = ((), {})
    sketch: Sequence[Float[Tensor, "..."]] = ()
    start: int = 0


class EditPatches(Sweep):
    """Edits as the engine runs them: all prompts of an edit together, from where the first of them begins."""

    title, unit, together = "edits", "edits", True

    def __init__(self, model: HookedTransformer, tokens: Shaped[Tensor, "prompt pos *d_in"], edits: Edits):
        self.model, self.tokens, self.edits = model, tokens, edits
        self.entering = model(tokens, stop_at_layer=edits.first_layer)
        self.past = KVCache() if edits.start else None

    def __len__(self) -> int:
        return self.edits.n

    @cached_property
    def stream(self) -> Float[Tensor, "prompt pos d_model"]:
        return self._upwards(self.entering, self.past)

    def _upwards(self, x: Tensor, past: KVCache | None) -> Tensor:
        """The stream that leaves the last block, from the one that enters the first edited layer."""
        first, last = self.edits.first_layer, self.model.cfg.n_layers
        return self.model(x, start_at_layer=first, stop_at_layer=last, kv_cache=past)

    def name_of(self, number: int) -> str:
        return f"edit {number}"

    def layer_of(self, number: int) -> int:
        return self.edits.first_layer

    def rows_at_once(self, memory: int) -> int:
        return max(1, min(_POSITIONS, memory // row_bytes(self.model, self.entering.element_size())))

    def live(self, reader: Reader) -> list[Item]:
        prompts = range(len(self.tokens))
        return [Item(number, prompt, self.edits.start) for number in range(len(self)) for prompt in prompts]

    def walk(self, reader: Reader, items: Sequence[Item]) -> list[Float[Tensor, "_pos d_model"]]:
        # items are all prompts of one edit after another
        start, past = self.edits.start, None
        index = torch.tensor([item.patch for item in items])
        prompt = torch.tensor([item.pair for item in items], device=self.tokens.device)
        if self.past is not None:
            past = self.past.before(start)
            past.keep_rows(prompt)
        with self.model.hooks(self.edits.hooks(index)):
            streams = self._upwards(self.entering[prompt, start:], past)
        if reader.read is None:
            return list(streams)
        at = (reader.read[prompt] - start).clamp_min(0)
        return list(streams[torch.arange(len(streams), device=at.device)[:, None], at])

    def plain(self, numbers: Sequence[int], reader: Reader) -> Float[Tensor, "edit prompt"]:
        indices = [torch.full((len(self.tokens),), number) for number in numbers]
        return torch.cat([reader.under_hooks(self.tokens, self.edits.hooks(index)) for index in indices])

    def asked(self) -> tuple[Any, Mapping[str, Any]]:
        asked, parts = self.edits.asked
        return ("edits", asked, self.tokens), parts

    def sketch(self) -> Sequence[Float[Tensor, "..."]]:
        return self.edits.sketch

    def fault(self, said: str, values: Float[Tensor, "edit prompt"]) -> str:
        return f"the metric is {said} under an edit, though it is finite without; choose a smaller one"


def run_edits(
    model: HookedTransformer,
    asked: Sequence[tuple[Edits, Shaped[Tensor, "_prompt _pos ..."], Any]],
    *,
    title: str,
    resume: Resume | None = None,
) -> list[Outcome]:
    """The metric of every prompt under every edit, for each (edits, prompts of one length, metric); all have as many.

    A few edits are run again one by one. `resume`: the file that keeps the values of all.
    """
    with products_of(resume):
        reason = why_plain(model)
        sweeps = [EditPatches(model, tokens, edits) for edits, tokens, _ in asked]
        readers, values, kept = begun(sweeps, [metric for *_, metric in asked], resume, whole=reason is not None)
        if (seen := not_finite(*(reader.base for reader in readers))) is not None:
            raise InputError(f"the metric is {seen} on the unedited prompts, so that edits have no effect to measure")
        reason = reason if drops_out(model) else None  # edits are hooks, beside which those of others may stand
        with progress(title, values.numel(), unit="prompts") as advance:
            return run_parts(zip(sweeps, readers, strict=True), values, kept=kept, reason=reason, advance=advance)
