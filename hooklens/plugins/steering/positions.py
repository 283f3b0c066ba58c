"""The positions of a forward pass that an edit changes, counted in real tokens, in a prompt and during generation."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.core.arguments import several
from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.core.hooks import HookCall

Positions = str | int | slice | Sequence[int] | Tensor
NAMES = ("all", "prompt", "generated")


def checked(positions: Positions) -> Positions:
    """Validate positions; an invalid value raises an error that lists the valid ones.

    >>> checked("generated"), checked(-1), checked([0, 3])
    ('generated', [-1], [0, 3])
    """
    if isinstance(positions, str):
        if positions not in NAMES:
            raise did_you_mean("positions", positions, NAMES)
        return positions
    if isinstance(positions, slice):
        ends = (positions.start, positions.stop)
        if positions.step not in (None, 1) or any(end is not None and not isinstance(end, int) for end in ends):
            raise InputError(f"a slice of positions needs integer ends and no step, got {positions}")
        return positions
    listed: Any = positions.tolist() if isinstance(positions, Tensor) else positions
    listed = [listed] if isinstance(listed, Integral) else listed
    if not isinstance(listed, Sequence) or any(isinstance(i, bool) or not isinstance(i, Integral) for i in listed):
        raise WrongType(f"positions must be {', '.join(map(repr, NAMES))}, numbers or a slice, got {positions!r:.60}")
    return [int(i) for i in listed]


def check_positions(positions: Positions, lengths: Sequence[int]) -> None:
    """Raise for positions that no prompt has, in prompts of these lengths; an edit there would change nothing.

    >>> check_positions([-1, 2], [2, 3])
    """
    if isinstance(positions, slice):
        missing: Any = [] if any(range(n)[positions] for n in lengths) else positions
    else:
        n = max(lengths)
        missing = [] if isinstance(positions, str) else [i for i in several("positions", positions) if not -n <= i < n]
    if missing:
        raise InputError(f"no prompt has the positions {missing!r:.80}; the longest one has {max(lengths)} tokens")


def touched(
    positions: Positions, hook: HookCall, n_new: int, *, strict: bool = False
) -> Bool[Tensor, "batch_or_one new_pos"] | bool:
    """Which of the `n_new` positions of this forward pass are selected; True for all, False for none.

    Numbers count real tokens from each row's first, without padding. Negative numbers count from the end of the row's
    prompt, which is the forward pass of `step` 0. All later positions come after the whole prompt.

    >>> call = HookCall("hook_embed", step=0, offset=0)
    >>> touched(slice(-1, None), call, 4).tolist(), touched([0, -2], call, 4).tolist()
    ([[False, False, False, True]], [[True, False, True, False]])
    >>> later = HookCall("hook_embed", step=3, offset=6)
    >>> touched(slice(-1, None), later, 1).tolist(), touched([6], later, 1).tolist(), touched("prompt", later, 1)
    ([[True]], [[True]], False)
    """
    if isinstance(positions, str):
        return positions == "all" or (positions == "prompt") == (hook.step == 0)
    prompt = hook.step == 0
    if hook.seen is None:
        place, length = torch.arange(hook.offset, hook.offset + n_new)[None], torch.tensor(hook.offset + n_new)
        real = torch.ones_like(place, dtype=torch.bool)
    else:  # count real tokens, without padding
        count = hook.seen.long().cumsum(1)
        place, length, real = count[:, -n_new:] - 1, count[:, -1:], hook.seen[:, -n_new:]
    if strict and prompt:
        _check_reached(positions, int(length.max()), hook.to_come)
    if isinstance(positions, slice):
        start, stop = positions.start, positions.stop
        selected = torch.ones_like(place, dtype=torch.bool)
        if start is not None and (start >= 0 or prompt):
            selected &= place >= (start if start >= 0 else length + start)
        if stop is not None and (stop >= 0 or prompt):
            selected &= place < (stop if stop >= 0 else length + stop)
        elif stop is not None:
            selected &= False
    else:
        selected = torch.zeros_like(place, dtype=torch.bool)
        for i in cast(Sequence[int], positions):
            if i >= 0 or prompt:
                selected |= place == (i if i >= 0 else length + i)
    return selected & real


def _check_reached(positions: Positions, n: int, to_come: int | None) -> None:
    """Raise for a position before the longest prompt, of n tokens, or behind all that can follow it."""
    listed = [positions.start or 0] if isinstance(positions, slice) else cast(Sequence[int], positions)
    end = math.inf if to_come is None else n + to_come
    for i in listed:
        if (i < -n and not isinstance(positions, slice)) or i >= end:
            follow = f", and at most {to_come} follow" if to_come else ""
            raise InputError(f"positions has {i}, and the longest prompt has {n} tokens{follow}")
