"""The model and the prompts that every method of this folder begins with: what is refused, and the run that is kept."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.cache import ActivationCache
from hooklens.core.errors import InputError
from hooklens.core.names import Where
from hooklens.data.prompts import Prompts, rows_of
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


def one_length(model: HookedTransformer, prompts: Prompts, *, least: int = 1) -> Int[Tensor, "sequence pos"]:
    """The prompts' token ids; all prompts must have the same number of tokens."""
    rows = rows_of(model, prompts, "prompts")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1 or lengths[0] < least:
        raise InputError(
            f"heads are compared on prompts of one length of at least {least} tokens, got lengths {lengths}; run each "
            "length separately"
        )
    return torch.stack(rows)


def captured(
    model: HookedTransformer, tokens: Int[Tensor, "sequence pos"], names: Where
) -> tuple[Float[Tensor, "sequence pos d_model"], ActivationCache]:
    """The stream that leaves the last block, and these activations; nothing is unembedded."""
    with torch.no_grad(), packed_linears(rows=1024):
        return model.run_with_cache(tokens, names, stop_at_layer=model.cfg.n_layers)
