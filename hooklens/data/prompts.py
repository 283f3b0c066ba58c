"""Prompts as rows of token ids or of vectors: texts, ids and vectors as tensors, and pairs grouped by length."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooklens.core.errors import ArgumentError, InputError, WrongType
from hooklens.model.config import VectorEmbed
from hooklens.model.ids import as_ids, show
from hooklens.model.transformer import HookedTransformer

Vectors = Sequence[Sequence[Sequence[float]]]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor | Vectors
#: One prompt: token ids [pos], or vectors [pos d_in] for a model that reads vectors.
Row = Int[Tensor, "_"] | Float[Tensor, "_ d_in"]


@dataclass(frozen=True)
class Pairs:
    """Prompt pairs of one length: `index` gives their places among the user's pairs."""

    index: tuple[int, ...]
    clean: Shaped[Tensor, "pair pos *d_in"]
    corrupted: Shaped[Tensor, "pair other_pos *d_in"]
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
            "{clean} and {corrupted} are the same {0}s, so that there is no difference to find; change at least one "
            "{0} of {corrupted}",
            "vector" if pairs[0].clean.is_floating_point() else "token",
        )


def rows_of(model: HookedTransformer, prompts: Prompts, name: str) -> list[Row]:
    """The token ids of each prompt; for a model that reads vectors, the vectors of each prompt."""
    if reads_vectors(model):
        return _vectors_of(model, prompts, name)
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


def reads_vectors(model: HookedTransformer) -> bool:
    """Whether the model reads vectors [batch pos d_in] instead of token ids."""
    return isinstance(model.cfg.embed, VectorEmbed)


def need_tokens(model: HookedTransformer, asker: str, instead: str) -> None:
    """Raise for a model that reads vectors, where a method needs a vocabulary of tokens.

    >>> from hooklens.testing import tiny_model
    >>> need_tokens(tiny_model(embed=VectorEmbed(d_in=3)), "the tuned lens", "use prediction_lens")
    Traceback (most recent call last):
    hooklens.core.errors.InputError: the tuned lens needs a model that reads tokens, and this one reads vectors of 3 ...
    """
    if reads_vectors(model):
        d_in = model.cfg.embed.d_in
        raise InputError(
            f"{asker} needs a model that reads tokens, and this one reads vectors of {d_in} numbers; {instead}"
        )


def _vectors_of(model: HookedTransformer, prompts: Any, name: str) -> list[Row]:
    """The vectors of each prompt, in the model's dtype and on its device."""
    d_in = model.cfg.embed.d_in
    what = (
        f"{name} holds vectors [prompt pos {d_in}], since this model reads vectors of {d_in} numbers instead of tokens"
    )
    try:
        one_length = not isinstance(prompts, list | tuple) or not any(isinstance(row, Tensor) for row in prompts)
        given = [_floats(part, model) for part in ([prompts] if one_length else prompts)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(f"{what}; got {prompts!r:.60}") from error
    rows = [row for part in given for row in (part if part.ndim == 3 else [part])]
    for row in rows:
        if row.ndim != 2 or row.shape[1] != d_in or not len(row) or not row.is_floating_point():
            raise InputError(f"{what}; got {row.dtype} {list(row.shape)}")
    if not rows:
        raise InputError(f"{what}; got no prompt")
    return [row.to(model.device, model.dtype) for row in rows]


def _floats(prompts: Any, model: HookedTransformer) -> Tensor:
    """A tensor of what was given. Integers stay integers, which are refused: they could be token ids."""
    given = torch.as_tensor(prompts)
    is_list = isinstance(prompts, list | tuple)
    return torch.as_tensor(prompts, dtype=model.dtype) if is_list and given.is_floating_point() else given


def same_inputs(a: Shaped[Tensor, "pair pos *d_in"], b: Shaped[Tensor, "pair pos *d_in"]) -> Bool[Tensor, "pair pos"]:
    """Where two batches of prompts of one length have the same token, or the same vector.

    >>> same_inputs(torch.tensor([[1, 2]]), torch.tensor([[1, 3]])).tolist()
    [[True, False]]
    >>> same_inputs(torch.ones(1, 2, 3), torch.ones(1, 2, 3)).tolist()
    [[True, True]]
    """
    return a == b if a.ndim == 2 else (a == b).all(-1)


def row_key(row: Shaped[Tensor, "pos *d_in"]) -> tuple[int | float, ...]:
    """A prompt as a key: the same for prompts of the same tokens or vectors."""
    return tuple(row.flatten().tolist())


def common_ends(a: Shaped[Tensor, "pos *d_in"], b: Shaped[Tensor, "other_pos *d_in"]) -> tuple[int, int]:
    """How many tokens or vectors two prompts share at their beginning, and at their end without counting any twice.

    >>> common_ends(torch.tensor([1, 2, 3, 9]), torch.tensor([1, 2, 4, 5, 9]))
    (2, 1)
    """
    n = min(len(a), len(b))
    first = next((i for i in range(n) if not torch.equal(a[i], b[i])), n)
    last = next((i for i in range(n - first) if not torch.equal(a[-1 - i], b[-1 - i])), n - first)
    return first, last


def first_difference(
    model: HookedTransformer, a: Shaped[Tensor, "pos *d_in"], b: Shaped[Tensor, "other_pos *d_in"]
) -> str:
    """Where two prompts first differ, with their tokens there; vectors are not written out."""
    at = common_ends(a, b)[0]
    if reads_vectors(model):
        return str(at)
    tokens = (repr(show(model, row[at : at + 1])[0]) if at < len(row) else "(end)" for row in (a, b))
    return f"{at}: {' | '.join(tokens)}"


def unequal_lengths(
    model: HookedTransformer,
    a: Shaped[Tensor, "pos *d_in"],
    b: Shaped[Tensor, "other_pos *d_in"],
    why: str = "",
    instead: str = "",
) -> ArgumentError:
    """The error for a pair of prompts of two lengths, where a method needs one."""
    if reads_vectors(model):
        return ArgumentError(
            "{clean} and {corrupted} must hold the same number of vectors" + why + ", got {0} and {1} "
            "(first difference at {2}); give prompts of one length" + instead,
            *(len(a), len(b), first_difference(model, a, b)),
        )
    return ArgumentError(
        "{clean} and {corrupted} must tokenise to the same length" + why + ", got {0} and {1} tokens "
        "(first difference at {2}); re-word the prompts" + instead,
        *(len(a), len(b), first_difference(model, a, b)),
    )
