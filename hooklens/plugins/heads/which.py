"""Parse and check the requested heads, and refuse unsupported models: shared by the methods of this folder."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hooklens.core.errors import InputError
from hooklens.sweeps.naive import drops_out

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

#: (layer, head) or "L5H1"; negative layers count from the end.
Heads = Sequence[tuple[int, int] | str]
_NAME = re.compile(r"L(-?\d+)H(\d+)")


def read_heads(model: "HookedTransformer", heads: Heads | None) -> list[tuple[int, int]]:
    """(layer, head) of every requested head, all of them for None; at least one, no duplicates, all existing.

    >>> from hooklens.testing import tiny_model
    >>> read_heads(tiny_model(), ["L0H1", (-1, 0)])
    [(0, 1), (1, 0)]
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if heads is None:
        return [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    asked = [heads] if isinstance(heads, str) else list(heads)
    found = [_read(one) for one in asked]
    inside = [at is not None and -n_layers <= at[0] < n_layers and 0 <= at[1] < n_heads for at in found]
    if not found or not all(inside):
        wrong = [one for one, good in zip(asked, inside, strict=True) if not good]
        raise InputError(
            f"heads are (layer, head) pairs or names such as 'L0H1', at least one, of layers 0 to {n_layers - 1} (or "
            f"-{n_layers} to -1) and heads 0 to {n_heads - 1}; got {wrong if wrong else heads!r:.80}"
        )
    chosen = [(at[0] % n_layers, at[1]) for at in found if at is not None]
    if len(set(chosen)) < len(chosen):
        raise InputError(f"heads= contains duplicates: {', '.join(f'L{a}H{b}' for a, b in chosen)}")
    return chosen


def _read(one: Any) -> tuple[int, int] | None:
    if isinstance(one, str):
        match = _NAME.fullmatch(one)
        return None if match is None else (int(match[1]), int(match[2]))
    try:
        layer, head = one
        return (int(layer), int(head)) if layer == int(layer) and head == int(head) else None
    except (TypeError, ValueError):
        return None


def refuse_dropout(model: "HookedTransformer") -> None:
    """Effects are differences between passes, and with dropout each pass draws its own masks."""
    if drops_out(model):
        raise InputError(
            "heads are compared between passes, which dropout makes different; call model.eval() to turn it off"
        )
