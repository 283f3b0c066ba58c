"""Padding: which tokens of each row are real, and selections of positions that count real tokens."""

import copy
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from hooklens.core.errors import InputError

Mask = Bool[Tensor, "batch pos"]

# Operations that keep the axes batch and pos, so that their result has the padding of their input ...
_ELEMENTWISE = {"abs", "add", "div", "exp", "log", "mul", "neg", "__rdiv__", "__rsub__", "sub"}
_ELEMENTWISE |= {"bfloat16", "clone", "contiguous", "cpu", "cuda", "detach", "double", "float", "half", "to"}
# ... if they work along the last axis only.
_LAST_AXIS = {"amax", "argmax", "argsort", "log_softmax", "logsumexp", "max", "mean", "min", "softmax", "sort", "sum"}
_KEEPING = _ELEMENTWISE | _LAST_AXIS | {"topk"}
# Operations that select, repeat, reorder or join rows along the batch axis, so that each row of the result keeps its
# mask; and which of their arguments is the axis.
_BY_ROW = {"cat": 1, "chunk": 2, "concat": 1, "concatenate": 1, "flip": 1, "index_select": 1, "narrow": 1}
_BY_ROW |= {"repeat_interleave": 2, "roll": 2, "select": 1, "split": 2, "stack": 1, "tensor_split": 2}
# Operations that would select by column, padding included.
_BY_COLUMN = frozenset({"select", "narrow", "index_select", "__setitem__"})


def columns(real: Mask, positions: Int[Tensor, "any_batch n"]) -> Int[Tensor, "batch n"]:
    """The column of each row's n-th real token: 0 is the first, -1 the last.

    >>> columns(torch.tensor([[True, True, False], [False, True, True]]), torch.tensor([[0, -1]]))
    tensor([[0, 1],
            [1, 2]])
    """
    length = real.sum(1, keepdim=True)
    positions = positions.to(real.device)
    at = torch.where(positions < 0, positions + length, positions)
    lacking = ((at < 0) | (at >= length)).nonzero()
    if len(lacking):
        row, which = lacking[0].tolist()
        n = int(length[row])
        held = f"0 to {n - 1} (or -{n} to -1)" if n else "none"
        raise InputError(
            f"pos {int(positions.expand_as(at)[row, which])} asked for; a row with {n} real tokens has {held}, the "
            "rest of it is padding; choose positions that every row has, or select some rows only"
        )
    return first_real(real).gather(1, at)


def first_real(real: Mask) -> Int[Tensor, "batch pos"]:
    """The columns of each row, with those of its real tokens first."""
    return real.long().argsort(dim=1, descending=True, stable=True)


def per_row(real: Mask, pos: Any) -> tuple[Int[Tensor, "any_batch n"], Any]:
    """The positions of each row that an index of the position axis selects, and the index to use in its place.

    >>> real = torch.tensor([[True, True, False], [False, True, True]])
    >>> per_row(real, slice(-1, None)), per_row(real, 5)
    ((tensor([[1],
            [1]]), slice(None, None, None)), (tensor([[5]]), 0))
    """
    if isinstance(pos, slice):
        lengths = real.sum(1).tolist()
        chosen = [list(range(n))[pos] for n in lengths]
        if len({len(some) for some in chosen}) > 1:
            raise InputError(
                f"pos {pos} is {sorted({len(some) for some in chosen})} positions of rows that have "
                f"{sorted(set(lengths))} real tokens; select the same number in each row, such as slice(-2, None), or "
                "rows of one length first"
            )
        return torch.tensor(chosen, dtype=torch.long, device=real.device), slice(None)
    asked = torch.as_tensor(pos, device=real.device)
    if asked.dtype == torch.bool or (asked.is_floating_point() and asked.numel()):
        raise InputError(
            f"pos {pos!r:.60} was given for padded rows, where positions count real tokens; give integers or a slice"
        )
    again: Any = 0 if asked.ndim == 0 else torch.arange(asked.numel(), device=real.device).view(asked.shape)
    return asked.reshape(1, -1).long(), again


def take(
    act: Shaped[Tensor, "batch ..."], axis: int, real: Bool[Tensor, "batch _"], pos: Any
) -> Shaped[Tensor, "batch ..."]:
    """The activation at some positions, counted in each row's real tokens.

    >>> act, real = torch.tensor([[1, 2, 0], [3, 4, 5]]), torch.tensor([[True, True, False], [True, True, True]])
    >>> take(act, 1, real, -1), take(act, 1, real, [0, -1]).tolist()
    (tensor([2, 5]), [[1, 2], [3, 5]])
    """
    positions, again = per_row(real, pos)
    at = columns(real, positions).to(act.device)
    rows = torch.arange(len(act), device=act.device)[:, None]
    kept = act.movedim(axis, 1)[rows, at].movedim(1, axis)
    return kept[(slice(None),) * axis + (again,)]


class PaddedTensor(Tensor):
    """Logits, or a residual stream, of rows of different lengths: `attention_mask` [batch pos] is False at padding.

    Integers that index the position axis count each row's real tokens, and raise if a row has fewer: `logits[:, -1]`
    are the logits at each prompt's last token, `logits[:, -2:]` those at its last two. Slices from the start, such as
    `logits[:, 1:]` and `logits[:, :-1]`, drop columns and keep the mask of the others, and so do operations on single
    positions, such as `log_softmax(-1)`. Operations that select, reorder or join rows (`logits.flip(0)`,
    `index_select`, `split`, `torch.cat` of batches, where a plain one counts as unpadded) keep each row's mask. Any
    other operation, and loading from a file, gives a plain tensor with the padded columns. `as_subclass(torch.Tensor)`
    gives this plain tensor, `logits[mask]` all real positions.

    >>> logits = padded(torch.tensor([[[1.0], [2.0], [0.0]]]), torch.tensor([[True, True, False]]))
    >>> logits[0, -1], type(logits.sum()).__name__
    (tensor([2.]), 'Tensor')
    """

    attention_mask: Bool[Tensor, "*batch pos"]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, PaddedTensor):
            if name == "__getitem__":
                return _item(first, args[1])
            if name == "unbind" and (*args[1:], *kwargs.values(), 0)[0] == 0:
                return tuple(first[i] for i in range(len(first)))
            if name in _BY_COLUMN and _selects_columns(first, name, args[1:], kwargs):
                raise InputError(
                    f"{name} would count padding among the positions of these rows; index them, x[:, -1], which counts "
                    "real tokens, or take x.as_subclass(torch.Tensor), whose columns are as padded"
                )
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if name in _BY_ROW and args and "out" not in kwargs:
                return _with_rows(out, _moved_masks(func, name, args, kwargs))
            if not _rowwise(name, args, kwargs):
                return out
            return _kept(out, args[:1] if name == "to" else args)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Tensor:
        return padded(copy.deepcopy(self.as_subclass(Tensor), memo), self.attention_mask)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A plain tensor, so that torch.load(weights_only=True) reads it, even where hooklens is not installed.
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def padded(x: Tensor, real: Bool[Tensor, "*batch pos"]) -> Tensor:
    """The tensor [batch pos ...] with its mask; a plain tensor if nothing is padded."""
    if bool(real.all()):
        return x
    marked = x.as_subclass(PaddedTensor)
    marked.attention_mask = real
    return marked


def _rowwise(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether this call works on each position separately."""
    if name not in _KEEPING or not args:
        return False
    if name in _ELEMENTWISE:
        return True
    others = args[2:] if name == "topk" else args[1:]
    dim = kwargs.get("dim", next((arg for arg in others if type(arg) is int), None))
    dim = -1 if dim is None and name in ("argsort", "sort", "topk") else dim
    return dim in (-1, args[0].ndim - 1)


def _kept(out: Any, args: tuple) -> Any:
    """The result with the mask of the operands, if they agree on it and it fits."""
    if isinstance(out, tuple):
        results: Any = type(out)  # for values and indices
        return results(_kept(part, args) for part in out)
    masks = [arg.attention_mask for arg in args if isinstance(arg, PaddedTensor)]
    if not isinstance(out, Tensor) or not masks or out.shape[: masks[0].ndim] != masks[0].shape:
        return out
    return padded(out, masks[0]) if all(torch.equal(masks[0], mask) for mask in masks[1:]) else out


def _moved_masks(func: Any, name: str, args: tuple, kwargs: dict) -> Any:
    """The result of applying the operation to the masks; None if it does more than move whole rows."""
    given = list(args[0]) if isinstance(args[0], list | tuple) else [args[0]]
    n_axes = 1 if name == "stack" else 2  # rows are stacked to a batch; all others have one
    masks = [x.attention_mask if isinstance(x, PaddedTensor) else x.new_ones(x.shape[:n_axes]).bool() for x in given]
    dims = _dims(name, args, kwargs, given[0].ndim + (name == "stack"))
    along_batch = 1 not in dims if name in ("flip", "roll") else dims == {0}
    if not dims or not along_batch or any(mask.ndim != n_axes for mask in masks):
        return None
    rest = given[0].ndim - n_axes
    # With as many axes as the tensors have, so that an axis may be counted from the end.
    wide = [mask.reshape(*mask.shape, *[1] * rest) for mask in masks]
    out = func(wide if isinstance(args[0], list | tuple) else wide[0], *args[1:], **kwargs)
    many = [out] if isinstance(out, Tensor) else out
    moved = [mask.reshape(mask.shape[: mask.ndim - rest]) for mask in many]
    return moved[0] if isinstance(out, Tensor) else moved


def _dims(name: str, args: tuple, kwargs: dict, ndim: int) -> set[int]:
    """The axes along which an operation works; empty if it flattens."""
    asked = [kwargs[key] for key in ("dim", "dims", "axis") if key in kwargs]
    asked = asked or list(args[_BY_ROW[name] :] if name == "flip" else args[_BY_ROW[name] :][:1])
    if not asked and name not in ("repeat_interleave", "roll"):
        asked = [0]
    listed = [dims if isinstance(dims, list | tuple) else (dims,) for dims in asked]
    flat = [dim for dims in listed for dim in dims]
    return {dim % ndim for dim in flat if dim is not None}


def _with_rows(out: Any, masks: Any) -> Any:
    if masks is None:
        return out
    if isinstance(out, Tensor):
        return padded(out, masks)
    return type(out)(padded(part, mask) for part, mask in zip(out, masks, strict=True))


def _selects_columns(x: PaddedTensor, name: str, args: tuple, kwargs: dict) -> bool:
    """Whether this call selects along the position axis."""
    axis = x.attention_mask.ndim - 1
    if name == "__setitem__":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        return not _is_mask(index) and not _by_columns(_full(index, x.ndim)[axis])
    return int(kwargs.get("dim", args[0] if args else 0)) % x.ndim == axis


def _item(x: PaddedTensor, index: Any) -> Tensor:
    plain, real = x.as_subclass(Tensor), x.attention_mask
    index = index if isinstance(index, tuple) else (index,)
    if _is_mask(index):
        return plain[index]
    if real.ndim == 1:
        return _of_batch(plain[None], real[None], [0, *_full(index, x.ndim)])
    return _of_batch(plain, real, _full(index, x.ndim))


def _of_batch(plain: Tensor, real: Mask, index: list[Any]) -> Tensor:
    """The entries of a full index whose first two axes are batch and pos (None adds an axis between)."""
    at_row, at_pos = [i for i, part in enumerate(index) if part is not None][:2]
    row, pos = index[at_row], index[at_pos]
    if _by_columns(pos):
        out = plain[tuple(index)]
        one_axis = type(row) in (int, slice) or torch.as_tensor(row).ndim == 1
        simple = one_axis and all(type(part) in (int, slice) for part in index[1:])
        return padded(out, real[row][..., pos]) if simple else out
    rows = torch.arange(len(plain), device=plain.device)[row]
    if type(row) is not slice:
        index[at_row] = torch.arange(rows.numel(), device=plain.device).view(rows.shape) if rows.ndim else 0
    else:
        index[at_row] = slice(None)
    chosen = real[rows.reshape(-1)]
    positions, index[at_pos] = per_row(chosen, pos)
    return plain[rows.reshape(-1, 1), columns(chosen, positions)][tuple(index)]


def _full(index: tuple, ndim: int) -> list[Any]:
    """An index with one entry for every axis; Ellipsis and omitted axes become full slices."""
    parts = list(index)
    n = ndim - sum(part is not None and part is not Ellipsis for part in parts)
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), None)
    if at is None:
        return parts + [slice(None)] * n
    return [*parts[:at], *[slice(None)] * n, *parts[at + 1 :]]


def _is_mask(index: tuple) -> bool:
    """Whether the index contains a mask over several axes, as in `logits[attention_mask]`."""
    return any(isinstance(part, Tensor) and part.dtype == torch.bool and part.ndim > 1 for part in index)


def _by_columns(pos: Any) -> bool:
    return isinstance(pos, slice) and (pos.start is None or pos.start >= 0) and (pos.step or 1) > 0
