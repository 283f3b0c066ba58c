"""The model and the prompts that every method of this folder begins with: what is refused, and the run that is kept."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.core.cache import ActivationCache
from hooklens.core.errors import InputError
from hooklens.core.names import Where
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompts import Prompts, reads_vectors, rows_of
from hooklens.data.repeated import repeated_tokens
from hooklens.metrics import prediction
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.sweeps.naive import drops_out

#: (layer, head) or "L5H1"; negative layers count from the end.
Heads = Sequence[tuple[int, int] | str]


def check_model(model: HookedTransformer, asker: str) -> None:
    """Refuse other objects, and dropout: effects are differences between passes, which each draw their own masks."""
    need_hooked(model, asker)
    if drops_out(model):
        raise InputError(
            "heads are compared between passes, which dropout makes different; call model.eval() to turn it off"
        )


def one_length(model: HookedTransformer, prompts: Prompts, *, least: int = 1) -> Shaped[Tensor, "sequence pos *d_in"]:
    """The prompts' token ids, or vectors; all prompts must have the same number of tokens."""
    rows = rows_of(model, prompts, "prompts")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1 or lengths[0] < least:
        raise InputError(
            f"heads are compared on prompts of one length of at least {least} tokens, got lengths {lengths}; run each "
            "length separately"
        )
    return torch.stack(rows)


def captured(
    model: HookedTransformer, tokens: Shaped[Tensor, "sequence pos *d_in"], names: Where
) -> tuple[Float[Tensor, "sequence pos d_model"], ActivationCache]:
    """The stream that leaves the last block, and these activations; nothing is unembedded."""
    with torch.no_grad(), packed_linears(rows=1024):
        return model.run_with_cache(tokens, names, stop_at_layer=model.cfg.n_layers)


def demo_sequences(model: HookedTransformer) -> tuple[Tensor, Any, Tensor]:
    """Four short sequences that repeat with the metric of their repeats, and four others; or vectors."""
    if reads_vectors(model):
        both = demo_texts(model, 8, 13)
        return both[:4], prediction(model), both[4:]
    repeats = repeated_tokens(model, 8, length=13)
    text = repeats.part(0, 4)
    return text.tokens, text.metric(), repeats.part(4, 8).tokens
