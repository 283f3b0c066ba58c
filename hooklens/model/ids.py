"""Token ids in the forms that people write, converted to one tensor."""

from collections.abc import Sequence, Sized
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.core.errors import InputError, WrongType


def as_ids(
    tokens: Any, what: str = "tokens are integers [batch pos]", device: torch.device | str | None = None
) -> Int[Tensor, "..."]:
    """Convert integers of any width, in lists, arrays or tensors, to one int64 tensor; `what` begins the error.

    >>> as_ids(torch.tensor([[7, 250]], dtype=torch.uint8))
    tensor([[  7, 250]])
    >>> as_ids([[1, 2], [3]])
    Traceback (most recent call last):
    hooklens.core.errors.InputError: tokens are integers [batch pos], got rows of 2 and 1; pad them and give an ...
    """
    if isinstance(tokens, list | tuple) and any(isinstance(row, Tensor) for row in tokens):
        tokens = [row.tolist() if isinstance(row, Tensor) else row for row in tokens]
    try:
        ids = torch.as_tensor(tokens, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        lengths = _lengths(tokens)
        if len(lengths) > 1:
            raise InputError(
                f"{what}, got rows of {' and '.join(map(str, lengths))}; pad them and give an attention_mask, or run "
                "each length separately (texts are padded for you)"
            ) from error
        raise WrongType(f"{what}, got {tokens!r:.80}") from error
    if ids.dtype == torch.bool or ids.is_complex() or (ids.is_floating_point() and ids.numel()):
        raise WrongType(f"{what}, got {ids.dtype} {list(ids.shape)}")
    return ids.long()  # torch converts an empty list to floats


def _lengths(tokens: Any) -> list[int]:
    """The distinct lengths of the rows, in order."""
    if not isinstance(tokens, Sequence) or not all(isinstance(row, Sized) for row in tokens):
        return []
    return list(dict.fromkeys(len(row) for row in tokens))


def as_mask(mask: Any, device: torch.device | str | None = None) -> Bool[Tensor, "rows pos"]:
    """Convert an attention mask, 1 or True at real tokens and 0 or False at padding, to booleans [batch pos].

    >>> as_mask([[1, 1, 0]])
    tensor([[ True,  True, False]])

    Floating-point masks raise an error: some libraries add these to the scores, with 0 at real tokens.
    """
    asked = "attention_mask is 1 (or True) at real tokens and 0 (or False) at padding, whole numbers or booleans"
    try:
        given = torch.as_tensor(mask, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(f"{asked}; got {mask!r:.80}") from error
    if given.is_floating_point() or given.is_complex():
        raise WrongType(f"{asked}; got {given.dtype} {list(given.shape)}")
    if given.dtype != torch.bool and not torch.compiler.is_compiling():
        odd = given[(given != 0) & (given != 1)]
        if len(odd):
            raise InputError(f"{asked}; got {int(odd[0])}")
    given = given.bool()
    return given[None] if given.ndim == 1 else given


def show(model: "HookedTransformer", ids: Any) -> list[str]:
    """Each token as text, or as its number if the model has no tokenizer; vectors [pos d_in] by their position."""
    ids = torch.as_tensor(ids)
    if ids.is_floating_point():
        return [f"vector {pos}" for pos in range(len(ids))]
    return [str(int(i)) for i in ids] if model.tokenizer is None else model.to_str_tokens(ids)


def show_text(model: "HookedTransformer", ids: Any) -> str:
    """A row of tokens as one text, or as numbers with spaces if the model has no tokenizer; vectors by their number."""
    if torch.as_tensor(ids).is_floating_point():
        return f"{len(ids)} vectors"
    return (" " if model.tokenizer is None else "").join(show(model, ids))
