"""Prompts as token ids: texts and ids converted to tensors, and pairs of prompts grouped by their lengths."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import ArgumentError, InputError, WrongType
from hooklens.model.ids import as_ids, show
from hooklens.model.transformer import HookedTransformer

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Pairs:
    """Prompt pairs of one length: `index` gives their places among the user's pairs."""

    index: tuple[int, ...]
    clean: Int[Tensor, "pair pos"]
    corrupted: Int[Tensor, "pair other_pos"]
    every: bool = True

    @property
    def aligned(self) -> bool:
        """Whether clean and corrupted prompts have the same number of tokens."""
        return self.clean.shape == self.corrupted.shape

    def of(self, metric: Any) -> Any:
        """The metric for these pairs, from the metric for all pairs."""
        if self.every or len(metric.reads.pos) == 1:
            return metric
        return metric.pairs(torch.tensor(self.index))


def read_pairs(model: HookedTransformer, clean: Prompts, corrupted: Prompts | None, by: Sequence[str]) -> list[Pairs]:
    """Group the pairs by their two lengths. A sweep by position needs one group, with both lengths equal."""
    if corrupted is None:
        raise ArgumentError("{corrupted} prompts are missing; give as many as clean ones, or PromptPairs with both")
    left, right = rows_of(model, clean, "clean"), rows_of(model, corrupted, "corrupted")
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if len(a) != len(b) and "pos" in by:
            raise unequal_lengths(model, a, b, " to be patched by position", " or patch by layer only ({by}='layer')")
        groups.setdefault((len(a), len(b)), []).append(i)
    if "pos" in by and len(groups) > 1:
        lengths = sorted(n for n, _ in groups)
        raise InputError(
            f"prompts patched by position must all have the same number of tokens, got {lengths}; "
            "patch each length on its own, or sweep by layer or by head"
        )
    return [
        Pairs(
            tuple(index),
            torch.stack([left[i] for i in index]),
            torch.stack([right[i] for i in index]),
            every=len(groups) == 1,
        )
        for index in groups.values()
    ]


def read_aligned(model: HookedTransformer, clean: Prompts, corrupted: Prompts | None) -> list[Pairs]:
    """The pairs grouped by length, for methods in which both prompts of a pair must have one length."""
    groups = read_pairs(model, clean, corrupted, ())
    for group in groups:
        if not group.aligned:
            raise unequal_lengths(model, group.clean[0], group.corrupted[0])
    return groups


def check_prompts_differ(pairs: Sequence[Pairs]) -> None:
    """Raise if every clean prompt equals its corrupted one: then there is no difference to explain."""
    if all(pair.aligned and torch.equal(pair.clean, pair.corrupted) for pair in pairs):
        raise ArgumentError(
            "{clean} and {corrupted} are the same tokens, so that there is no difference to find; change at least one "
            "token of {corrupted}"
        )


def rows_of(model: HookedTransformer, prompts: Prompts, name: str) -> list[Int[Tensor, "pos"]]:
    """The token ids of each prompt."""
    if isinstance(prompts, Tensor) and prompts.numel():
        if prompts.is_floating_point() or prompts.ndim not in (1, 2):
            raise WrongType(f"{name} tokens are integers [pair pos], got {prompts.dtype} {list(prompts.shape)}")
        return list(torch.atleast_2d(as_ids(prompts, f"{name} tokens are integers [pair pos]", model.device)))
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Sequence) and len(prompts) and all(isinstance(p, str) for p in prompts):
        return [model.to_tokens(str(p))[0] for p in prompts]
    what = f"{name} is a text, a list of texts, or token ids"
    if not isinstance(prompts, Iterable):
        raise WrongType(f"{what}; got {prompts!r:.80}")
    rows = [as_ids(row, what, model.device) for row in prompts]
    if rows and all(row.ndim == 0 for row in rows):
        rows = [torch.stack(rows)]
    if not rows or any(not row.numel() for row in rows):
        raise InputError(
            f"{name} is empty or holds an empty prompt, got {prompts!r:.80}; give at least one prompt of at least one "
            "token"
        )
    if any(row.ndim != 1 for row in rows):
        raise InputError(f"each prompt of {name} is one row of token ids, got {prompts!r:.80}")
    return rows


def common_ends(a: Int[Tensor, "pos"], b: Int[Tensor, "other_pos"]) -> tuple[int, int]:
    """How many tokens two prompts share at their beginning, and at their end without counting any twice.

    >>> common_ends(torch.tensor([1, 2, 3, 9]), torch.tensor([1, 2, 4, 5, 9]))
    (2, 1)
    """
    n = min(len(a), len(b))
    first = next((i for i in range(n) if a[i] != b[i]), n)
    last = next((i for i in range(n - first) if a[-1 - i] != b[-1 - i]), n - first)
    return first, last


def first_difference(model: HookedTransformer, a: Int[Tensor, "pos"], b: Int[Tensor, "other_pos"]) -> str:
    """Where two prompts first differ, with their tokens there."""
    at = common_ends(a, b)[0]
    tokens = (repr(show(model, row[at : at + 1])[0]) if at < len(row) else "(end)" for row in (a, b))
    return f"{at}: {' | '.join(tokens)}"


def unequal_lengths(
    model: HookedTransformer, a: Int[Tensor, "pos"], b: Int[Tensor, "other_pos"], why: str = "", instead: str = ""
) -> ArgumentError:
    """The error for a pair of prompts of two lengths, where a method needs one."""
    return ArgumentError(
        "{clean} and {corrupted} must tokenise to the same length" + why + ", got {0} and {1} tokens "
        "(first difference at {2}); re-word the prompts" + instead,
        *(len(a), len(b), first_difference(model, a, b)),
    )
