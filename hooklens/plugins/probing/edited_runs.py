"""Edits of prompts that move an activation at one position of each along many directions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.hooks import HookCall
from hooklens.core.names import axes, parse
from hooklens.data.prompts import Pairs
from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.many_edits import Edits, Hooks


def moves_along(
    model: HookedTransformer,
    groups: Sequence[Pairs],
    *,
    point: str,
    pos: Int[Tensor, "prompt"],
    shift: Float[Tensor, "kind prompt"],
    directions: Float[Tensor, "direction d"],
    asked: Any = (),
) -> list[Edits]:
    """The edits of each group of prompts: every kind of shift, along every direction, at each prompt's position."""
    moves = torch.cartesian_prod(torch.arange(len(shift)), torch.arange(len(directions)))
    from_start = not model.cfg.causal or "key_pos" in axes(point)  # rot_k shows cached keys again

    def hooks(index: Int[Tensor, "row"], rows: Int[Tensor, "prompt"]) -> Hooks:
        kind, direction = moves[index].unbind(1)
        rows = rows[torch.arange(len(index)) % len(rows)]
        return [(point, partial(_add, shift[kind, rows, None] * directions[direction], pos[rows]))]

    return [
        Edits(
            n=len(moves),
            hooks=partial(hooks, rows=torch.tensor(group.index)),
            first_layer=getattr(parse(point), "layer", 0),
            asked=((point, pos, asked), {}),
            sketch=(shift, directions),
            start=0 if from_start else int(pos[list(group.index)].min()),
        )
        for group in groups
    ]


def _add(change: Float[Tensor, "row d"], pos: Int[Tensor, "row"], act: Tensor, hook: HookCall) -> Tensor:
    at = (torch.arange(len(act), device=act.device), pos.to(act.device) - hook.offset)
    act[at] += change.to(act).view(act[at].shape)
    return act
