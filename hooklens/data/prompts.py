"""Prompt pairs: texts or tokens, brought to tensors, grouped by length, with errors that say where they part."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import ArgumentError, InputError, WrongType
from hooklens.model.ids import as_ids, show

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Pairs:
    """Prompt pairs of one length: `index` says which of the user's pairs they are."""

    index: tuple[int, ...]
    clean: Int[Tensor, "pair pos"]
    corrupted: Int[Tensor, "pair other_pos"]
    every: bool = True

    @property
    def aligned(self) -> bool:
        """Has every clean prompt as many tokens as its corrupted one?"""
        return self.clean.shape == self.corrupted.shape

    def of(self, metric: Any) -> Any:
        """The metric of these pairs, made from that of all pairs."""
        if self.every or len(metric.reads.pos) == 1:
            return metric
        return metric.pairs(torch.tensor(self.index))


def read_pairs(model: "HookedTransformer", clean: Prompts, corrupted: Prompts | None, by: Sequence[str]) -> list[Pairs]:
    """The pairs grouped by their two lengths; by position there must be one group, and both lengths equal."""
    if corrupted is None:
        raise ArgumentError("{corrupted} prompts are missing; give as many as clean ones, or PromptPairs with both")
    left, right = rows_of(model, clean, "clean"), rows_of(model, corrupted, "corrupted")
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if len(a) != len(b) and "pos" in by:
            raise _part(model, a, b, " to be patched by position", " or patch by layer only ({by}='layer')")
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


def read_aligned(model: "HookedTransformer", clean: Prompts, corrupted: Prompts | None) -> list[Pairs]:
    """The pairs grouped by length, for methods in which both prompts of a pair must have one length."""
    groups = read_pairs(model, clean, corrupted, ())
    for group in groups:
        if not group.aligned:
            raise _part(model, group.clean[0], group.corrupted[0])
    return groups


def check_prompts_differ(pairs: Sequence[Pairs]) -> None:
    """Where no clean prompt differs from its corrupted one, nothing can carry a difference."""
    if all(pair.aligned and torch.equal(pair.clean, pair.corrupted) for pair in pairs):
        raise ArgumentError(
            "{clean} and {corrupted} are the same tokens, so that there is no difference to find; change at least one "
            "token of {corrupted}"
        )


def rows_of(model: "HookedTransformer", prompts: Prompts, name: str) -> list[Int[Tensor, "pos"]]:
    """Each prompt's token ids."""
    if isinstance(prompts, Tensor):
        if not prompts.numel():
            raise _empty(name, list(prompts.shape))
        if prompts.is_floating_point() or prompts.ndim not in (1, 2):
            raise WrongType(f"{name} tokens are integers [pair pos], got {prompts.dtype} {list(prompts.shape)}")
        return list(torch.atleast_2d(as_ids(prompts, f"{name} tokens are integers [pair pos]", model.device)))
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Sequence) and len(prompts) and all(isinstance(p, str) for p in prompts):
        return [model.to_tokens(str(p))[0] for p in prompts]
    if not isinstance(prompts, Iterable):
        raise WrongType(f"{name} is a text, a list of texts, or token ids; got {prompts!r:.80}")
    what = f"{name} is a text, a list of texts, or token ids"
    rows = [as_ids(row, what, model.device) for row in prompts]
    if rows and all(row.ndim == 0 for row in rows):
        rows = [torch.stack(rows)]
    if not rows or any(not row.numel() for row in rows):
        raise _empty(name, f"{prompts!r:.80}")
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


def _empty(name: str, seen: Any) -> InputError:
    return InputError(
        f"{name} is empty or holds an empty prompt, got {seen}; give at least one prompt of at least one token"
    )


def _part(model: "HookedTransformer", a: Tensor, b: Tensor, why: str = "", instead: str = "") -> ArgumentError:
    at = common_ends(a, b)[0]
    shown = " | ".join(repr(show(model, row[at : at + 1])[0]) if at < len(row) else "(end)" for row in (a, b))
    return ArgumentError(
        "{clean} and {corrupted} must tokenise to the same length" + why + ", got {0} and {1} tokens "
        "(first difference at {2}: {3}); re-word the prompts" + instead,
        *(len(a), len(b), at, shown),
    )
