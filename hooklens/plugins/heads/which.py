"""Whether a model can be asked about its heads at all: the same for every method of this folder."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hooklens.core.errors import InputError
from hooklens.sweeps.naive import drops_out

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

#: (layer, head) or "L5H1"; negative layers count from the end.
Heads = Sequence[tuple[int, int] | str]


def refuse_dropout(model: "HookedTransformer") -> None:
    """Effects are differences between passes, and with dropout each pass draws its own masks."""
    if drops_out(model):
        raise InputError(
            "heads are compared between passes, which dropout makes different; call model.eval() to turn it off"
        )
