"""What an ablation writes in place of an activation: nothing, a mean, another prompt's value, a given run's value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.data.prompts import Pairs, rows_of
from hooklens.plugins.patching.values import Mean, mean_of, means_of_others

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Tokens = Int[Tensor, "prompt pos"]
Written = Tensor | dict[str, Tensor] | Callable[[Tensor, str], Tensor]

_WORDS = ("zero", "mean", "resample")


@dataclass(frozen=True)
class Resample:
    """Write another prompt's activation, `draws` times with another prompt each time; effects are averaged.

    Prompts are drawn from `reference`, or from the ablated prompts themselves: those of the same length that are not
    the prompt's own tokens.
    """

    reference: Any = None
    draws: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Freeze:
    """Write the activation of a given other run, prompt by prompt: `run` holds as many prompts of the same lengths."""

    run: Any


Kind = Mean | Resample | Freeze


def as_kind(value: Any) -> Kind | None:
    """A kind of ablation from its name; None is zero. The mean and the draws are then over the other prompts."""
    if isinstance(value, str):
        if value not in _WORDS:
            raise did_you_mean("kind of ablation", value, _WORDS)
        return {"zero": None, "mean": Mean(None), "resample": Resample()}[value]
    if not isinstance(value, Mean | Resample | Freeze):
        raise WrongType(
            f"value is one of {', '.join(map(repr, _WORDS))}, hl.Mean(reference=...), Resample(...) or Freeze(run), "
            f"got {value!r:.60}; arbitrary values are written by hl.patch"
        )
    if isinstance(value, Resample) and (isinstance(value.draws, bool) or value.draws < 1):
        raise InputError(f"Resample draws at least one other prompt, got draws={value.draws!r}")
    return value


def word(kind: Kind | None) -> str:
    """What the ablation is called in tables and figures."""
    if isinstance(kind, Mean):
        return "mean"
    return "zero" if kind is None else "resample" if isinstance(kind, Resample) else "freeze"


def written_by_draw(
    model: "HookedTransformer", kind: Kind | None, prompts: Any, groups: list[Pairs], site: str
) -> list[list[Written]]:
    """What a plan writes, a row a draw (one but for Resample), in it one entry a group of prompts of one length."""
    if kind is None:
        return [[lambda act, name: torch.zeros_like(act)] * len(groups)]
    if isinstance(kind, Mean):
        return [_means(model, kind, prompts, groups, site)]
    if isinstance(kind, Freeze):
        return [_frozen(model, kind, groups)]
    pool = rows_of(model, prompts if kind.reference is None else kind.reference, "reference")
    generator = seeded(kind.seed)
    donors = [donors_of(group.clean, pool, kind.draws, generator) for group in groups]
    draws = max(map(len, donors))
    return [[each[draw % len(each)] for each in donors] for draw in range(draws)]


def _means(model: "HookedTransformer", kind: Mean, prompts: Any, groups: list[Pairs], site: str) -> list[Written]:
    if kind.reference is None:
        n = sum(len(group.index) for group in groups)
        if n < 2:
            raise InputError(
                "value='mean' is the mean over the other prompts, and there is one prompt; give more prompts, or "
                "value=hl.Mean(reference=prompts)"
            )
        return [*means_of_others(model, rows_of(model, prompts, "prompts"), groups, site)]
    return [mean_of(model, kind, group.clean, site) for group in groups]


def _frozen(model: "HookedTransformer", kind: Freeze, groups: list[Pairs]) -> list[Written]:
    rows, n = rows_of(model, kind.run, "run"), sum(len(group.index) for group in groups)
    if len(rows) != n:
        raise InputError(f"Freeze(run) holds one prompt for each that is ablated, got {len(rows)} for {n}")
    out: list[Written] = []
    for group in groups:
        lengths = {len(rows[i]) for i in group.index}
        if lengths != {group.clean.shape[1]}:
            raise InputError(
                f"Freeze(run) writes position by position: prompts of {group.clean.shape[1]} tokens were to be frozen "
                f"to runs of {', '.join(map(str, sorted(lengths)))}; re-word them, or use value='mean'"
            )
        out.append(torch.stack([rows[i] for i in group.index]))
    return out


def donors_of(
    tokens: Tokens, pool: list[Int[Tensor, "_"]], draws: int, generator: torch.Generator
) -> Int[Tensor, "draw prompt pos"]:
    """For every prompt, other prompts of its length from the pool, none twice before all were drawn."""
    same_length = [row for row in pool if len(row) == tokens.shape[1]]
    chosen: list[list[Tensor]] = []
    for own in tokens:
        others = [row for row in same_length if not torch.equal(row, own)]
        if not others:
            raise InputError(
                f"resampling needs another prompt of {len(own)} tokens for every prompt of that length, and there is "
                "none; give value=Resample(reference=prompts of that length), or value='mean'"
            )
        order = torch.randperm(len(others), generator=generator)[:draws].tolist()
        chosen.append([others[i] for i in order])
    most = max(map(len, chosen))
    return torch.stack([torch.stack([others[draw % len(others)] for others in chosen]) for draw in range(most)])
